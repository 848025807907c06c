"""How Triton kernels are launched. Does not import triton itself."""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braidsdk.kernels.weight import Int8


@dataclass(frozen=True)
class Tile:
    """How a kernel over a few rows cuts its weight.

    Attributes:
        block_n: rows of the weight that one program owns.
        block_k: columns that one load takes, half as many for float32.
        warps: per program.
        stages: how many such loads are in flight.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int

    def columns(self, x: Tensor) -> int:
        """`block_k` for `x` [rows, size]: no wider than its rows need."""
        fitting = max(16, 1 << (x.shape[1] - 1).bit_length())
        return min(self.block_k * 2 // x.itemsize, fitting)


MATRIX_ROWS = 16
"""From so many rows a program on, products take matrix instructions."""

Tiles = dict[str, dict[int, dict[int, Tile]]]
"""By what the weight's numbers are ("float" or "int8"), its columns, and the rows that one program takes."""


def numbers(weight: Tensor | Int8) -> str:
    """What the numbers of a weight are, as `Tiles` names them."""
    return "int8" if isinstance(weight, Int8) else "float"


def read_tiles(file: Path) -> Tiles:
    """The tiles of an operation's `tiles.json`, which `benchmarks/kernels/linear.py` writes."""
    stored: dict[str, dict[str, dict[str, dict[str, int]]]] = json.loads(file.read_text(encoding="utf-8"))
    return {
        kind: {
            int(columns): {int(rows): Tile(**tile) for rows, tile in by_rows.items()}
            for columns, by_rows in by_columns.items()
        }
        for kind, by_columns in stored.items()
    }


def write_tiles(file: Path, tiles: Tiles) -> None:
    """Keep tiles for `read_tiles`, a line each."""
    kinds = []
    for kind, by_columns in tiles.items():
        columns = []
        for size, by_rows in sorted(by_columns.items()):
            lines = [f'      "{rows}": {json.dumps(asdict(tile))}' for rows, tile in sorted(by_rows.items())]
            columns.append(f'    "{size}": {{\n' + ",\n".join(lines) + "\n    }")
        kinds.append(f'  "{kind}": {{\n' + ",\n".join(columns) + "\n  }")
    file.write_text("{\n" + ",\n".join(kinds) + "\n}\n", encoding="utf-8")


def tile_for(tiles: Tiles, rows: int, weight: Tensor | Int8) -> tuple[int, Tile]:
    """For so many rows of `x` and a weight [out, in], the rows that one program takes, and its shape.

    Of the table's columns the fewest that are not fewer than the weight's, else the most; the same for rows, where
    several programs share what is beyond the most.
    """
    by_columns, columns = tiles[numbers(weight)], weight.shape[1]
    by_rows = by_columns[min((size for size in by_columns if size >= columns), default=max(by_columns))]
    block_rows = min((size for size in by_rows if size >= rows), default=max(by_rows))
    return block_rows, by_rows[block_rows]


def pointers(weight: Tensor | Int8) -> tuple[Tensor, Tensor | None]:
    """A weight as kernels take it: its numbers, and their scales if it is in int8.

    Raises:
        ValueError: it is in int8, and the number of its columns is no multiple of 4.
    """
    if isinstance(weight, Int8) and weight.shape[1] % 4:
        raise ValueError(
            f"backend='triton' reads int8 weights by words of 4 columns, got {weight.shape[1]} columns; pass "
            "backend='torch'."
        )
    return (weight.values, weight.scales) if isinstance(weight, Int8) else (weight, None)


def padded(head_dim: int) -> int:
    """The power of two that device code takes for a head: it masks what lies beyond `head_dim`."""
    return 1 << (head_dim - 1).bit_length()


@cache
def dependent_launch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for every launch: programmatic dependent launch (PDL) where the device has it.

    A kernel launched so may begin while the one before it still runs. It reads nothing but weights, and writes
    nothing, before it has waited for that one to end. So a weight must not be written by any kernel later than the
    last but one before its first use; a model's weights are on the device long before.
    """
    return {"USE_PDL": True, "launch_pdl": True} if dependent_launch(device) else {"USE_PDL": False}


_counters: dict[tuple[str, torch.device], Tensor] = {}


def counters(op: str, device: torch.device, size: int) -> Tensor:
    """At least `size` zeroed arrival counters, int32, kept for `op` on `device`; kernels leave them zeroed.

    Launches of one operation share them, so they must follow one another on one stream. Call an operation once before
    its launch is captured in a CUDA graph: a graph must not own the counters.
    """
    kept = _counters.get((op, device))
    if kept is None or len(kept) < size:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{op}: run it once with as many rows before capturing it in a CUDA graph.")
        kept = _counters[op, device] = torch.zeros(max(size, 4096), dtype=torch.int32, device=device)
    return kept
