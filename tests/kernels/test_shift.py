"""Shifts on each backend against a plain mean in float64; kernels in the interpreter where there is no GPU."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from braidsdk.kernels.paging import Shift
from braidsdk.kernels.rope import RotaryTable, rotate
from braidsdk.kernels.shift import apply_shifts, plan_shifts
from braidsdk.kernels.shift.reference import apply_shifts_reference

PAGE, LIMIT = 16, 4096
GEOMETRIES = [(1, 16), (2, 64), (3, 80), (1, 96)]
SIZES = [[1], [33, 1, 64, 7], [5] * 20]
LENGTH = 1.3
"""Of the model's rotations."""


class Case:
    """Shifts of so many tokens each, over memory that is NaN wherever no token lies."""

    def __init__(self, kv_heads: int, head_dim: int, sizes: list[int], device: torch.device) -> None:
        pages = 2 * sum(sizes) // PAGE + 8
        self.kv = torch.full((2, pages, kv_heads, PAGE, head_dim), float("nan"), dtype=torch.float64)
        inv_freq = 1.0 / (1e4 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        self.rotary = {d: RotaryTable(inv_freq, LENGTH, d, device) for d in (torch.float32, torch.float64)}
        slots = torch.randperm(pages * PAGE)
        self.shifts, self.device, self.means = [], device, []
        for size in sizes:
            fresh, stored, target, slots = slots[:size], slots[size : 2 * size], slots[2 * size], slots[2 * size + 1 :]
            turn, weight = int(torch.randint(LIMIT, ())), float(torch.rand(())) + 0.1
            mine = torch.randn(2, size, kv_heads, head_dim, dtype=torch.float64)
            moves = torch.randn(2, size, kv_heads, head_dim, dtype=torch.float64) + 1
            self.means.append(moves.mean(1) * weight)
            angle = turn * inv_freq.double()[None]
            turned = rotate((mine + moves)[0], angle.cos() * LENGTH, angle.sin() * LENGTH)
            self.kv[:, stored // PAGE, :, stored % PAGE] = mine.transpose(0, 1)
            self.kv[:, fresh // PAGE, :, fresh % PAGE] = torch.stack((turned, (mine + moves)[1]), 1)
            self.shifts.append(Shift(fresh, stored, int(target), turn, weight))

    def targets(self, kv: Tensor) -> Tensor:
        slots = torch.tensor([shift.target for shift in self.shifts], device=kv.device)
        return kv[:, slots // PAGE, :, slots % PAGE]  # [shifts, 2, kv_heads, head_dim]

    def run(self, backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The memory before and afterwards."""
        before = self.kv.to(self.device, dtype)
        kv = before.clone()
        wide = torch.promote_types(dtype, torch.float32)
        apply_shifts(kv, plan_shifts(self.shifts, self.rotary[wide]), backend=backend)
        return before, kv


@pytest.mark.parametrize(("kv_heads", "head_dim"), GEOMETRIES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_torch_gives_the_mean_of_what_moved(kv_heads: int, head_dim: int, sizes: list[int], seed: int) -> None:
    case = Case(kv_heads, head_dim, sizes, torch.device("cpu"))
    _, kv = case.run("torch", torch.float64)
    torch.testing.assert_close(case.targets(kv), torch.stack(case.means), rtol=1e-9, atol=1e-9)
    plain = case.kv.clone()
    apply_shifts_reference(plain, plan_shifts(case.shifts, case.rotary[torch.float64]))
    torch.testing.assert_close(kv, plain, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("kv_heads", "head_dim"), GEOMETRIES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_backends_agree_with_the_reference_and_write_nothing_else(
    kv_heads: int, head_dim: int, sizes: list[int], backend: str, device: torch.device, dtype: torch.dtype,
    seed: int, assert_near,
) -> None:  # fmt: skip
    case = Case(kv_heads, head_dim, sizes, device)
    before, kv = case.run(backend, dtype)
    truth = before.double()
    apply_shifts_reference(truth, plan_shifts(case.shifts, case.rotary[torch.float64]))
    assert_near(case.targets(kv), case.targets(truth), dtype)
    slots = torch.tensor([shift.target for shift in case.shifts], device=device)
    for each in (before, kv):
        each[:, slots // PAGE, :, slots % PAGE] = 0
    assert torch.equal(before.nan_to_num(9e3), kv.nan_to_num(9e3))


def test_angles_of_another_head_dim_are_refused(device: torch.device) -> None:
    case = Case(1, 32, [3], device)
    shifts = plan_shifts(case.shifts, case.rotary[torch.float32])
    with pytest.raises(ValueError, match="apply_shifts: expected cos of shape"):
        apply_shifts(case.kv.float(), replace(shifts, cos=shifts.cos[:, 1:]))


def test_triton_refuses_float64(device: torch.device) -> None:
    case = Case(1, 32, [3], device)
    with pytest.raises(ValueError, match="needs"):
        case.run("triton", torch.float64)


class Calls(TorchDispatchMode):
    """Counts what torch is called for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_many_shifts_take_as_many_calls_as_one() -> None:
    counts = []
    for sizes in ([3, 3], [3] * 9):
        case = Case(1, 32, sizes, torch.device("cpu"))
        kv, shifts = case.kv.float(), plan_shifts(case.shifts, case.rotary[torch.float32])
        with Calls() as calls:
            apply_shifts(kv, shifts)
        counts.append(calls.count)
    assert counts[0] == counts[1]
