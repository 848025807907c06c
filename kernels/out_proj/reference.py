"""Projection and residual, torch reference."""

from torch import Tensor

from braidsdk.kernels.projection import project


def out_proj_reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`residual + x @ weight.T + bias`.

    Args:
        x: [tokens, size].
        weight: [hidden, size].
        bias: [hidden], or None.
        residual: [tokens, hidden].

    Returns:
        [tokens, hidden], the dtype of `x`.
    """
    return project(x, weight, bias, residual)
