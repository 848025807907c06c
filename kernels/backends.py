"""Which backends compute a model's operations, and what obstructs each. To follow `Braid(kernels="auto")`, read
`braidsdk/engine/kernel_choice.py`, then this, then the `BACKENDS` of an operation's `op.py`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Literal, Self

import torch

from braidsdk.kernels import native

Backend = Literal["torch", "native", "triton"]
"""What computes an operation: torch, C kernels for CPUs, or Triton kernels for GPUs."""

MOST_GROUP = 64
"""Query heads per KV head that Triton's attention takes: the rows of its largest product."""


@dataclass(frozen=True)
class Backends:
    """One backend per operation, by the folders' names."""

    norm_qkv: Backend = "torch"
    attention: Backend = "torch"
    out_proj: Backend = "torch"
    swiglu: Backend = "torch"
    head: Backend = "torch"

    @classmethod
    def all(cls, backend: Backend) -> Self:
        return cls(**dict.fromkeys(OPS, backend))

    @property
    def triton(self) -> bool:
        """Whether Triton's kernels compute every operation."""
        return self == Backends.all("triton")

    def __str__(self) -> str:
        by_backend: dict[str, list[str]] = {}
        for op in OPS:
            by_backend.setdefault(getattr(self, op), []).append(op)
        return (
            next(iter(by_backend))
            if len(by_backend) == 1
            else ", ".join(f"{backend} for {' and '.join(ops)}" for backend, ops in by_backend.items())
        )


OPS = tuple(each.name for each in fields(Backends))


@dataclass(frozen=True)
class Geometry:
    """A model's shapes, the form of its layers, and its dtype: what decides whether a backend can run it.

    Attributes:
        hidden, intermediate: widths of the residual stream and of the MLP.
        q_heads, kv_heads, head_dim: heads of a layer, and the size of one.
        vocab: rows of the LM head.
        dtype: its name in torch.
        qk_norm: whether the heads of queries and keys are normed.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        int8: whether the weights of products are in 8-bit integers.
    """

    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    dtype: str
    qk_norm: bool = True
    qkv_bias: bool = False
    int8: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class Obstacles:
    """What keeps a backend from running.

    Attributes:
        model: why it can't run a model of this geometry on this device, whatever the machine has; None if it can.
        machine: why this machine can't run it on this device; None if it can. It may compile kernels.
    """

    model: Callable[[Geometry, torch.device], str | None]
    machine: Callable[[torch.device], str | None]


def obstacle(backend: Backend, geometry: Geometry, device: torch.device) -> str | None:
    """Why a backend can't run a model here; None if it can."""
    found = OBSTACLES[backend]
    return found.model(geometry, device) or found.machine(device)


def interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _nothing(*_: object) -> None:
    return None


def _native_model(geometry: Geometry, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the model is on {device}; the C kernels need the CPU"
    if geometry.dtype != "bfloat16":
        return f"the model is in torch.{geometry.dtype}; the C kernels need bfloat16"
    if native.cpu_obstacle() is None and (needed := native.head_dim_obstacle(geometry.head_dim)):
        return f"the model's head_dim is {geometry.head_dim}; the C kernels need {needed}"
    return None


def _triton_model(geometry: Geometry, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the model is on {device}; Triton kernels need a CUDA device"
    if geometry.dtype not in ("float32", "bfloat16"):
        return f"the model is in torch.{geometry.dtype}; Triton kernels need bfloat16 or float32"
    if geometry.head_dim % 16:
        return f"the model's head_dim is {geometry.head_dim}; Triton kernels need a multiple of 16"
    if (group := geometry.q_heads // geometry.kv_heads) > MOST_GROUP:
        return f"the model has {group} query heads per KV head; Triton kernels take {MOST_GROUP} at most"
    return None


def _triton_machine(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere, compute capability 8.0"
    return None


OBSTACLES: dict[Backend, Obstacles] = {
    "torch": Obstacles(_nothing, _nothing),
    "native": Obstacles(_native_model, lambda _: native.obstacle()),
    "triton": Obstacles(_triton_model, _triton_machine),
}
"""By backend. An operation's own dictionary, in its `op.py`, says what computes it."""
