"""Products with a weight matrix on the CPU, the weight packed once for oneDNN."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from braidsdk.kernels.weight import Int8

_PACKED_FOR_ROWS = 32
"""oneDNN chooses a layout for so many rows; by measurement it serves 1 to 256 equally well."""


def pack(weight: Tensor) -> Tensor:
    """A weight as `project` reads it fastest: for bfloat16 on a CPU in oneDNN's own layout, else as it is.

    Without it oneDNN packs the weight again in every call. A packed weight is read by `project` alone.

    Args:
        weight: [out, in]; one that is packed stays so.
    """
    packable = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not weight.is_mkldnn
    if not packable or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
    return packed


def project(x: Tensor, weight: Tensor | Int8, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """`residual + x @ weight.T + bias`; over a packed weight summed in float32 and rounded once.

    Args:
        x: [rows, in].
        weight: [out, in], perhaps packed. `Int8` is converted in each call, some rows at a time, which is slow.
        bias: [out], or None.
        residual: [rows, out], or None.

    Returns:
        [rows, out], the dtype of `x`.
    """
    product: Tensor
    if isinstance(weight, Int8):
        product = torch.cat([linear(x, piece.dense(x.dtype)) for piece in weight.pieces()], dim=1)
        product = product if bias is None else product + bias
        return product if residual is None else residual + product
    if weight.is_mkldnn and residual is not None:
        product = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
        return product
    if weight.is_mkldnn:
        product = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    if len(x) == 1 and bias is None and x.device.type == "cpu":
        product = torch.mv(weight, x[0])[None]  # reads a large matrix a fifth faster than a product of one row
    else:
        product = linear(x, weight, bias)
    return product if residual is None else residual + product
