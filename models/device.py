"""Turns names of devices, dtypes and forms of weights into what they stand for."""

import torch

from braidsdk.errors import InputError, did_you_mean, shown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""The dtypes that a model can be computed in. float64 is the reference for measuring the others."""

WEIGHTS = ("auto", "int8")
"""How the weights of products are kept: in the dtype that is computed in, or in 8-bit integers."""


def parse_device(device: str) -> torch.device:
    """The device of that name. "auto" means CUDA if there is a CUDA device, else the CPU.

    Raises:
        InputError: there is no such device here.
    """
    if not isinstance(device, str):
        raise InputError(f"device must be text such as 'cpu'; got a {type(device).__name__}.")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
    except RuntimeError:
        parsed = None
    if parsed is None or parsed.type not in ("cpu", "cuda"):
        raise InputError(
            f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N'; got {shown(device)}."
            f"{did_you_mean(device, ('auto', 'cpu', 'cuda'))}"
        )
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device must be one that torch sees, the CPU or {torch.cuda.device_count()} CUDA devices; got {device!r}. "
            "Use 'cpu'."
        )
    return parsed


def parse_dtype(dtype: str) -> torch.dtype | None:
    """The dtype of that name. "auto" gives None, which means the dtype that the checkpoint's config names.

    Raises:
        InputError: there is no such dtype.
    """
    if dtype == "auto":
        return None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(
            f"dtype must be 'auto', {', '.join(map(repr, DTYPES))}; got {shown(dtype)}.{did_you_mean(dtype, DTYPES)}"
        )
    return DTYPES[dtype]


def parse_weights(weights: str) -> bool:
    """Whether weights are kept in int8.

    Raises:
        InputError: there is no such form.
    """
    if not isinstance(weights, str) or weights not in WEIGHTS:
        raise InputError(
            f"weights must be {' or '.join(map(repr, WEIGHTS))}; got {shown(weights)}. Leave it out for 'auto'."
            f"{did_you_mean(weights, WEIGHTS)}"
        )
    return weights == "int8"
