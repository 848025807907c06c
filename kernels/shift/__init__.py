"""Shifts: the mean by which some tokens of an entry move when they are computed again, kept as a key and a value."""

from braidsdk.kernels.shift.op import apply_shifts
from braidsdk.kernels.shift.plan import Shifts, plan_shifts

__all__ = ["Shifts", "apply_shifts", "plan_shifts"]
