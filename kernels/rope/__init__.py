"""Rotary position embedding."""

from braidsdk.kernels.rope.reference import RotaryTable, rotate

__all__ = ["RotaryTable", "rotate"]
