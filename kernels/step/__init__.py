"""The beginning and the end of a step whose tokens the device has chosen: what the first layer reads, and positions."""

from braidsdk.kernels.step.op import begin_step, end_step

__all__ = ["begin_step", "end_step"]
