"""The tensors of an entry, in the places of their bytes in paged memory."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from braidsdk.cache.codecs import plain

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    page_size=st.sampled_from([1, 4, 7]),
    head_dim=st.sampled_from([2, 8]),
    dtype=st.sampled_from(sorted(DTYPES)),
    data=st.data(),
)
def test_the_tensors_are_the_tokens_of_the_pages_in_order(
    layers: int, kv_heads: int, page_size: int, head_dim: int, dtype: str, data: st.DataObject
) -> None:
    memory = torch.randn(layers, 2, 6, kv_heads, page_size, head_dim).to(DTYPES[dtype])
    pages = data.draw(st.permutations(range(6)).flatmap(lambda ids: st.integers(1, 6).map(lambda n: ids[:n])))
    tokens = data.draw(st.integers((len(pages) - 1) * page_size + 1, len(pages) * page_size))
    tensors = plain.tensors(memory.view(torch.uint8).numpy(), pages, tokens, dtype)
    assert list(tensors) == [f"layer.{layer:03d}" for layer in range(layers)]
    for layer, tensor in zip(memory, tensors.values(), strict=True):
        assert (tensor.dtype, tensor.shape) == (dtype, (2, kv_heads, tokens, head_dim))
        wanted = layer[:, pages].transpose(1, 2).flatten(2, 3)[:, :, :tokens]
        held = torch.frombuffer(bytearray(b"".join(tensor.buffers)), dtype=DTYPES[dtype])
        assert torch.equal(held.view(tensor.shape), wanted)
        assert tensor.nbytes == math.prod(tensor.shape) * DTYPES[dtype].itemsize


def test_what_is_written_to_them_lies_on_the_pages_alone() -> None:
    memory = torch.zeros(1, 2, 4, 2, 3, 2)
    for buffer in plain.tensors(memory.view(torch.uint8).numpy(), [3, 1], 5, "float32")["layer.000"].buffers:
        buffer[:] = torch.ones(len(buffer) // 4).numpy().tobytes()
    filled = memory[0, :, :, :, :, 0]
    assert torch.equal(filled[:, 3], torch.ones(2, 2, 3))
    assert torch.equal(filled[:, 1], torch.tensor([1.0, 1.0, 0.0]).expand(2, 2, 3))
    assert not filled[:, [0, 2]].any()
