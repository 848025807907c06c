"""Products with a weight matrix on the CPU, the weight packed once for oneDNN."""

import torch
from torch import Tensor
from torch.nn.functional import linear

_PACKED_FOR_ROWS = 32
"""oneDNN chooses a layout for so many rows; by measurement it serves 1 to 256 equally well."""


def pack(weight: Tensor) -> Tensor:
    """A weight as `project` reads it fastest: for bfloat16 on a CPU in oneDNN's own layout, else as it is.

    Without it oneDNN packs the weight again in every call. A packed weight is read by `project` alone.

    Args:
        weight: [out, in].
    """
    packable = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if not packable or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
    return packed


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`.

    Args:
        x: [rows, in].
        weight: [out, in], perhaps packed.
        bias: [out], or None.

    Returns:
        [rows, out], the dtype of `x`.
    """
    if weight.is_mkldnn:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return linear(x, weight, bias)
