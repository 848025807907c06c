"""Which implementation each operation of a model takes."""

from dataclasses import dataclass, fields
from typing import Self

from braidsdk.kernels.launch import Path


@dataclass(frozen=True)
class Paths:
    """One path per operation, by the folders' names."""

    norm_qkv: Path = "torch"
    attention: Path = "torch"
    out_proj: Path = "torch"
    swiglu: Path = "torch"
    head: Path = "torch"

    @classmethod
    def all(cls, path: Path) -> Self:
        return cls(**{each.name: path for each in fields(cls)})

    @property
    def triton(self) -> bool:
        """Whether every operation takes its Triton kernels."""
        return self == Paths.all("triton")

    def __str__(self) -> str:
        by_path: dict[str, list[str]] = {}
        for each in fields(self):
            by_path.setdefault(getattr(self, each.name), []).append(each.name)
        return (
            next(iter(by_path))
            if len(by_path) == 1
            else ", ".join(f"{path} for {' and '.join(ops)}" for path, ops in by_path.items())
        )


TORCH = Paths()
"""The plain torch of every operation."""

AMX = Paths.all("amx")
"""Every operation on its C kernels."""
