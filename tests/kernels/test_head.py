"""Final norm, LM head and greedy choice against their references, in Triton's interpreter where there is no GPU."""

import pytest
import torch

from braidsdk.kernels.head import greedy, launch, norm_head

EPS = 1e-6


def arguments(rows, size, vocab, dtype, device):
    """Random hidden states, norm, head and eps."""
    hidden = torch.randn(rows, size, device=device).to(dtype)
    norm = (torch.rand(size, device=device) + 0.5).to(dtype)
    return hidden, norm, (torch.randn(vocab, size, device=device) * size**-0.5).to(dtype), EPS


def truth(hidden, norm, head, eps):
    return norm_head(hidden.double(), norm.double(), head.double(), eps)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 15, 16, 17, 33, 65])
@pytest.mark.parametrize(("size", "vocab"), [(96, 257), (160, 128)])
def test_logits_equal_the_truth(rows, size, vocab, dtype, device, seed, poisoned, assert_near) -> None:
    values = arguments(rows, size, vocab, dtype, device)
    logits = norm_head(*values, backend="triton")
    assert logits.dtype == torch.float32
    assert_near(logits, truth(*values), dtype)


@pytest.mark.parametrize("size", [896, 2048, 2560])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_nothing_is_read_past_the_ends(rows, size, dtype, device, seed, poisoned, fenced, assert_near) -> None:
    hidden, norm, head, eps = arguments(rows, size, 21, dtype, device)
    logits = norm_head(fenced(hidden), fenced(norm), fenced(head), eps, backend="triton")
    assert_near(logits, truth(hidden, norm, head, eps), dtype)
    assert torch.equal(greedy(fenced(logits), backend="triton")[0], greedy(logits)[0])


@pytest.mark.parametrize("rows", [2, 16, 64])
def test_rows_of_a_program_change_rounding_only(
    rows, device, monkeypatch, tiles_of, seed, poisoned, assert_near
) -> None:
    """Whatever entry of the table serves, alone or several programs of it."""
    monkeypatch.setattr(launch, "TILES", tiles_of(rows, launch.TILES))
    values = arguments(rows + 5, 96, 140, torch.float32, device)
    assert_near(norm_head(*values, backend="triton"), truth(*values), torch.float32)


@pytest.mark.parametrize("rows", [2, 33])
def test_logits_are_as_close_to_the_truth_as_torchs(rows, dtype, device, assert_as_good) -> None:
    if dtype == torch.float32:
        pytest.skip("float32 rounds nothing but its sums")

    def results():
        values = arguments(rows, 256, 300, dtype, device)
        return norm_head(*values, backend="triton"), norm_head(*values), truth(*values)

    assert_as_good(results)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("vocab", [5, 4096, 10_007])
def test_greedy_takes_the_lowest_id_among_equals(vocab, rows, backend, device, seed, poisoned) -> None:
    logits = torch.randn(rows, vocab, device=device)
    places = torch.stack([torch.randperm(vocab)[:3] for _ in range(rows)]).to(device)
    logits.scatter_(1, places, 9.0)
    for _ in range(3):  # counters are left as they were found
        chosen = greedy(logits, backend=backend)
        assert chosen.dtype == torch.int64
        assert torch.equal(chosen, torch.stack((places.amin(1), torch.ones_like(places[:, 0]))))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 4095, 4096, 5000])
def test_greedy_tells_rows_that_are_not_finite(place, value, backend, device, seed) -> None:
    logits = torch.randn(3, 5001, device=device)
    logits[1, place] = value
    logits[0, 17] = logits[2, 4999] = 50.0
    ids, finite = greedy(logits, backend=backend)
    assert finite.tolist() == [True, False, True]
    assert ids[[0, 2]].tolist() == [17, 4999]
    assert 0 <= ids[1] < 5001


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_greedy_of_nothing_but_nan_lies_within_the_vocabulary(backend, device) -> None:
    ids, finite = greedy(torch.full((2, 4099), float("nan"), device=device), backend=backend)
    assert ids.tolist() == [0, 0]
    assert not finite.any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_writes_columns_of_a_larger_tensor_and_no_others(rows, backend, device, seed) -> None:
    logits = torch.randn(rows, 300, device=device)
    logits[-1, 5] = float("nan")
    room = torch.full((2, 7), -5, device=device)
    out = room[:, :rows]
    assert greedy(logits, out=out, backend=backend) is out
    assert torch.equal(out[:, :-1], greedy(logits)[:, :-1])
    assert out[1, -1] == 0
    assert (room[:, rows:] == -5).all()
    for wrong in (room, out.int(), out.t()[:1]):
        with pytest.raises(ValueError, match="greedy: expected out"):
            greedy(logits, out=wrong, backend=backend)


def test_greedy_wants_float32(device) -> None:
    with pytest.raises(ValueError, match="float32"):
        greedy(torch.zeros(1, 8, dtype=torch.float16, device=device), backend="triton")


def test_no_rows(device) -> None:
    logits = norm_head(*arguments(0, 32, 50, torch.float32, device), backend="triton")
    assert logits.shape == (0, 50)
    ids, finite = greedy(logits, backend="triton")
    assert ids.shape == finite.shape == (0,)


@pytest.mark.gpu
def test_the_whole_vocabulary_of_qwen3(dtype, device, seed, poisoned, assert_near) -> None:
    values = arguments(5, 1024, 151_936, dtype, device)
    logits = norm_head(*values, backend="triton")
    assert_near(logits, truth(*values), dtype)
    assert torch.equal(greedy(logits, backend="triton")[0], greedy(logits)[0])
