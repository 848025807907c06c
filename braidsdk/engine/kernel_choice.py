"""Decides which kernels a model runs on, from what was asked for and what this machine can do."""

import importlib.metadata
import json
import logging
import os
import warnings
from contextlib import suppress
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path as FilePath
from time import perf_counter
from typing import TYPE_CHECKING

import torch
import xxhash
from platformdirs import user_cache_dir

from braidsdk import kernels
from braidsdk.engine.self_test import ENDED, geometry_of, self_test
from braidsdk.errors import InputError
from braidsdk.kernels import native
from braidsdk.kernels.attention.amx import HEAD_DIMS
from braidsdk.kernels.attention.launch import LARGE_M
from braidsdk.kernels.paths import AMX, Paths
from braidsdk.models.base import Model
from braidsdk.progress import steps_bar

if TYPE_CHECKING:
    from braidsdk.kernels.launch import Path

_log = logging.getLogger(__name__)

OPS = tuple(each.name for each in fields(Paths))


class KernelsWarning(UserWarning):
    """Something runs on torch's own kernels although the machine could do better."""


def parse_kernels(kernels: str | None) -> dict[str, str]:
    """The path that is asked for, by operation: "auto", "triton", "amx" or "torch".

    Args:
        kernels: one of them for all operations. Exceptions may follow, as in "auto,attention=torch". None means
            `BRAID_KERNELS`, or "auto".

    Raises:
        InputError: it is not of that form.
    """
    text = os.environ.get("BRAID_KERNELS") or "auto" if kernels is None else kernels
    form = (
        "'auto', 'triton', 'amx' or 'torch', or one of them with exceptions such as 'auto,attention=torch' "
        f"({', '.join(OPS)})"
    )
    if not isinstance(text, str):
        raise InputError(f"kernels must be {form}; got a {type(text).__name__}.")
    first, *exceptions = (part.strip() for part in text.split(","))
    wanted = dict.fromkeys(OPS, first)
    for exception in exceptions:
        op, _, path = exception.partition("=")
        if op not in OPS:
            raise InputError(f"kernels must be {form}; got {text[:80]!r}.")
        wanted[op] = path
    if not set(wanted.values()) <= {"auto", "triton", "amx", "torch"}:
        raise InputError(f"kernels must be {form}; got {text[:80]!r}.")
    return wanted


def obstacle(model: Model) -> str | None:
    """Why no Triton kernel can run this model; None if they can."""
    device, head_dim = model.device, model.config.head_dim
    if device.type != "cuda":
        return f"the model is on {device}; Triton kernels need a CUDA device"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere, compute capability 8.0"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"the model is in {model.dtype}; Triton kernels need bfloat16 or float32"
    if head_dim % 16:
        return f"the model's head_dim is {head_dim}; Triton kernels need a multiple of 16"
    if (group := model.config.q_heads // model.config.kv_heads) > LARGE_M:
        return f"the model has {group} query heads per KV head; Triton kernels take {LARGE_M} at most"
    return None


def _not_for_amx(model: Model) -> str | None:
    """Why the C kernels would not run this model on any machine."""
    if model.device.type != "cpu":
        return f"the model is on {model.device}; the C kernels need the CPU"
    if model.dtype != torch.bfloat16:
        return f"the model is in {model.dtype}; the C kernels need bfloat16"
    if model.config.head_dim not in HEAD_DIMS:
        return f"the model's head_dim is {model.config.head_dim}; the C kernels need {', '.join(map(str, HEAD_DIMS))}"
    return None


def amx_obstacle(model: Model) -> str | None:
    """Why the C kernels can't run this model here; None if they can. The first call compiles them."""
    return _not_for_amx(model) or native.obstacle()


def choose_paths(wanted: dict[str, str], model: Model) -> Paths:
    """The path of each operation.

    "auto" takes Triton's kernels on a CUDA device and the C kernels on a CPU with AMX, if they can run this model, and
    torch's otherwise. The first time on a device, separate processes try each Triton kernel on this model's shapes.
    torch replaces a kernel that fails, with one warning. The results are remembered.

    Raises:
        InputError: "triton" or "amx" was asked for and can't run here.
    """
    asked = {"auto", "amx"} & set(wanted.values())
    reasons = {"triton": obstacle(model), "amx": amx_obstacle(model) if asked else "torch was asked for"}
    for path, reason in reasons.items():
        if reason and path in wanted.values():
            raise InputError(f"kernels={path!r} can't run here: {reason}. Use kernels='auto'.")
    if reasons["triton"]:
        if model.device.type == "cuda" and "auto" in wanted.values():
            warnings.warn(
                f"Running on torch's kernels, which are slower: {reasons['triton']}.", KernelsWarning, stacklevel=4
            )
        return _cpu_paths(wanted, model, reasons["amx"])
    troubles = _troubles(model) if "auto" in wanted.values() else {}
    fallen = {op: troubles[op] for op, choice in wanted.items() if choice == "auto" and op in troubles}
    if fallen:
        warnings.warn(
            f"These operations run on torch's kernels, which are slower: "
            f"{'; '.join(f'{op} ({trouble})' for op, trouble in fallen.items())}. `braid doctor` says more.",
            KernelsWarning,
            stacklevel=4,
        )
    paths: dict[str, Path] = {
        op: "torch" if choice == "torch" or op in fallen else "triton" for op, choice in wanted.items()
    }
    return Paths(**paths)


def _cpu_paths(wanted: dict[str, str], model: Model, reason: str | None) -> Paths:
    """The paths if Triton's kernels can't run: the C kernels, unless there is a reason against them."""
    could = _not_for_amx(model) is None and native.cpu_obstacle() is None
    if reason and could and "auto" in wanted.values():
        warnings.warn(f"Running on torch's kernels, which are slower: {reason}.", KernelsWarning, stacklevel=5)
    by_op: dict[str, Path] = {
        op: "torch" if reason or choice == "torch" else getattr(AMX, op) for op, choice in wanted.items()
    }
    return Paths(**by_op)


def _troubles(model: Model) -> dict[str, str]:
    """What is wrong with each operation's kernels. It is found out once and then remembered."""
    memory = FilePath(user_cache_dir("braidsdk")) / "kernels.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    key = _setting(model)
    if key not in known:
        _log.info("compiling and trying each kernel, once for this model on this device")
        started = perf_counter()
        with steps_bar("compiling and trying kernels, once") as bar:
            results = self_test(model, timed=False, report=bar)
        _log.info("tried %d cases of the kernels in %.0f s", len(results), perf_counter() - started)
        found = {result.op: result.trouble for result in results if not result.ok}
        if any("out of memory" in trouble or trouble.startswith(ENDED) for trouble in found.values()):
            return found  # true now, perhaps not the next time
        known[key] = found
        with suppress(OSError):  # if this fails, the next process repeats the test
            memory.parent.mkdir(parents=True, exist_ok=True)
            scratch = memory.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(known, indent=1), encoding="utf-8")
            scratch.replace(memory)
    return dict(known[key])


def _setting(model: Model) -> str:
    """Everything that decides whether the kernels work: device, versions, their source, and what is tried on them."""
    source = xxhash.xxh3_64()
    for file in sorted(FilePath(kernels.__file__).parent.rglob("*.py")):
        source.update(file.read_bytes())
    parts = (
        torch.cuda.get_device_name(model.device),
        torch.__version__,
        importlib.metadata.version("triton"),
        source.hexdigest(),
        geometry_of(model),
    )
    return " ".join(map(str, parts))
