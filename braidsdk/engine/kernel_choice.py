"""Decides which kernels a model runs on, from what was asked for and what this machine can do."""

import importlib.metadata
import json
import logging
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import get_args

import torch
import xxhash
from platformdirs import user_cache_dir

from braidsdk import kernels
from braidsdk.engine.self_test import ENDED, self_test
from braidsdk.errors import InputError
from braidsdk.kernels import native
from braidsdk.kernels.backends import OBSTACLES, OPS, Backend, Backends, Geometry, obstacle
from braidsdk.progress import steps_bar

_log = logging.getLogger(__name__)


class KernelsWarning(UserWarning):
    """Something runs on torch's own kernels although the machine could do better."""


def parse_kernels(kernels: str | None) -> dict[str, str]:
    """The backend that is asked for, by operation: "auto", "triton", "native" or "torch".

    Args:
        kernels: one of them for all operations. Exceptions may follow, as in "auto,attention=torch". None means
            `BRAID_KERNELS`, or "auto".

    Raises:
        InputError: it is not of that form.
    """
    text = os.environ.get("BRAID_KERNELS") or "auto" if kernels is None else kernels
    form = (
        "'auto', 'triton', 'native' or 'torch', or one of them with exceptions such as 'auto,attention=torch' "
        f"({', '.join(OPS)})"
    )
    if not isinstance(text, str):
        raise InputError(f"kernels must be {form}; got a {type(text).__name__}.")
    first, *exceptions = (part.strip() for part in text.split(","))
    wanted = dict.fromkeys(OPS, first)
    for exception in exceptions:
        op, _, backend = exception.partition("=")
        if op not in OPS:
            raise InputError(f"kernels must be {form}; got {text[:80]!r}.")
        wanted[op] = backend
    if not set(wanted.values()) <= {"auto", *get_args(Backend)}:
        raise InputError(f"kernels must be {form}; got {text[:80]!r}.")
    return wanted


def choose_backends(wanted: dict[str, str], geometry: Geometry, device: torch.device) -> Backends:
    """The backend of each operation, before a weight is read.

    "auto" takes Triton's kernels on a CUDA device and the C kernels on a CPU, if they can run this model, and torch's
    otherwise. The first time on a CUDA device, separate processes try each Triton kernel on this model's shapes. torch
    replaces a kernel that fails, with one warning. The results are remembered.

    Raises:
        InputError: "triton" or "native" was asked for and can't run here.
    """
    for name in get_args(Backend):
        if name in wanted.values() and (reason := obstacle(name, geometry, device)):
            raise InputError(f"kernels={name!r} can't run here: {reason}. Use kernels='auto'.")
    if "auto" not in wanted.values():
        return _taken(wanted, geometry)
    fastest: Backend = "triton" if device.type == "cuda" else "native"
    reason, fallen = obstacle(fastest, geometry, device), {}
    if reason:
        if device.type == "cuda" or _could_be_native(geometry, device):
            _warn(f"Running on torch's kernels, which are slower: {reason}.")
        fastest = "torch"
    elif fastest == "triton":
        troubles = _troubles(geometry, device)
        fallen = {op: troubles[op] for op, name in wanted.items() if name == "auto" and op in troubles}
        if fallen:
            listed = "; ".join(f"{op} ({trouble})" for op, trouble in fallen.items())
            _warn(f"These operations run on torch's kernels, which are slower: {listed}. `braid doctor` says more.")
    automatic = {op: "torch" if op in fallen else fastest for op in OPS}
    return _taken({op: automatic[op] if name == "auto" else name for op, name in wanted.items()}, geometry)


def _taken(by_op: Mapping[str, str], geometry: Geometry) -> Backends:
    """These backends; with a warning where weights in int8 gain nothing."""
    if geometry.int8 and any(name == "torch" for op, name in by_op.items() if op != "attention"):
        _warn(
            "Weights in int8 save memory, but torch's operations convert them in each call, which is many times slower "
            "than weights='auto'. Use weights='auto' here, or kernels that read int8 (docs/performance.md)."
        )
    return Backends(**by_op)  # type: ignore[arg-type]


def _could_be_native(geometry: Geometry, device: torch.device) -> bool:
    """Whether the C kernels would run such a model on this CPU if nothing were wrong with this machine's set-up."""
    return OBSTACLES["native"].model(geometry, device) is None and native.cpu_obstacle() is None


def _warn(message: str) -> None:
    warnings.warn(message, KernelsWarning, stacklevel=6)


def _troubles(geometry: Geometry, device: torch.device) -> dict[str, str]:
    """What is wrong with each operation's kernels. It is found out once and then remembered."""
    memory = Path(user_cache_dir("braidsdk")) / "kernels.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    key = _setting(geometry, device)
    if key not in known:
        _log.info("compiling and trying each kernel, once for this model on this device")
        started = perf_counter()
        with steps_bar("compiling and trying kernels, once") as bar:
            results = self_test(geometry, device, timed=False, report=bar)
        _log.info("tried %d cases of the kernels in %.0f s", len(results), perf_counter() - started)
        found = {result.op: result.trouble for result in results if not result.ok}
        if any("out of memory" in trouble or trouble.startswith(ENDED) for trouble in found.values()):
            return found  # true now, perhaps not the next time
        known[key] = found
        with suppress(OSError):  # if this fails, the next process repeats the test
            for folder in (memory.parent.parent, memory.parent):  # the user's alone: C kernels are loaded from there
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            scratch = memory.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(known, indent=1), encoding="utf-8")
            scratch.replace(memory)
    return dict(known[key])


def _setting(geometry: Geometry, device: torch.device) -> str:
    """Everything that decides whether the kernels work: device, versions, their source, and what is tried on them."""
    source = xxhash.xxh3_64()
    folder = Path(kernels.__file__).parent
    for file in sorted((*folder.rglob("*.py"), *folder.rglob("tiles.json"))):
        source.update(file.read_bytes())
    parts = (
        torch.cuda.get_device_name(device),
        torch.__version__,
        importlib.metadata.version("triton"),
        source.hexdigest(),
        geometry,
    )
    return " ".join(map(str, parts))
