"""The choice of a token: what can be drawn, how often, from which seed; interpreted where there is no GPU."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from braidsdk.kernels.sample import Choices, sample
from braidsdk.kernels.sample.launch import find_bounds
from braidsdk.kernels.sample.reference import exponential, kept_reference, philox, sample_reference

BACKENDS = ["torch", "triton"]


def choices(vocab: int, device: torch.device, *rows: dict[str, float]) -> Choices:
    made = Choices.greedy(torch.zeros(len(rows), vocab, dtype=torch.bool, device=device))
    for index, row in enumerate(rows):
        for place, name in enumerate(("temperature", "top_p", "min_p", "penalty")):
            if name in row:
                made.shape[place, index] = row[name]
        for place, name in enumerate(("top_k", "seed", "step")):
            if name in row:
                made.draws[place, index] = int(row[name])
    return made


def kept_by_triton(logits: Tensor, made: Choices) -> Tensor:
    """What `draw` keeps of each row, from the bounds that it is given."""
    found = find_bounds(logits, made)
    scores = logits * (1 / made.shape[0, :, None]).float()
    scores = torch.where(scores == 0, 0.0, scores)
    bits = scores.view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    limit, cut = found.bounds[:2, :, None]
    kept = (keys > limit) | ((keys == limit) & (torch.arange(logits.shape[1], device=logits.device) >= cut))
    assert torch.equal(found.tops, scores.amax(1))
    return kept & ((scores - found.tops[:, None]).exp() >= made.shape[2, :, None])


LOGITS: dict[str, Callable[[int], Tensor]] = {
    "random": lambda vocab: torch.randn(vocab) * 3,
    "flat": lambda vocab: torch.randn(vocab) * 1e-3,
    "equal": lambda vocab: torch.zeros(vocab),
    "tied": lambda vocab: torch.randint(-4, 5, (vocab,)).float(),
    "peaked": lambda vocab: torch.randn(vocab).index_fill(0, torch.tensor([vocab // 2]), 40.0),
    "negative": lambda vocab: -100 - torch.rand(vocab) * 20,
    "zeros": lambda vocab: torch.where(torch.rand(vocab) < 0.5, -0.0, 0.0),
    "clustered": lambda vocab: torch.randn(vocab) + 9.0 * (torch.arange(vocab) < 40),
}


@pytest.mark.parametrize(
    ("make", "vocab"),
    [
        *((make, 517) for make in LOGITS),
        *((make, vocab) for make in ("random", "tied") for vocab in (2, 3, 5000)),
        *(pytest.param(make, 151_936, marks=pytest.mark.gpu) for make in LOGITS),
    ],
)
def test_what_is_kept_is_what_the_reference_keeps(make: str, vocab: int, device: torch.device, poisoned: None) -> None:
    """Shares that no sum of equals hits: there rounding alone decides."""
    torch.manual_seed(vocab)
    settings = [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 1.0, "top_k": 300},
        {"temperature": 1.3, "top_k": 10_000},
        {"temperature": 1.0, "top_p": 0.9513},
        {"temperature": 2.0, "top_p": 0.5071},
        {"temperature": 0.1, "top_p": 0.999},
        {"temperature": 1.0, "top_p": 1e-20},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.9037},
        {"temperature": 1.5, "top_k": 500, "top_p": 0.8029, "min_p": 0.01},
    ]
    logits = torch.stack([LOGITS[make](vocab) for _ in settings]).to(device)
    kept = kept_by_triton(logits, choices(vocab, device, *settings))
    for row, setting in enumerate(settings):
        scores = logits[row].cpu() * (1 / setting["temperature"])
        want = kept_reference(
            scores, int(setting.get("top_k", 0)), setting.get("top_p", 1.0), setting.get("min_p", 0.0)
        )
        assert want.any()
        differing = (kept[row].cpu() != want).nonzero().flatten()
        assert not len(differing), f"{setting}: {differing[:5].tolist()} of {len(differing)}"


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "setting",
    [{"temperature": 0.5}, {"temperature": 1.0, "top_k": 12}, {"temperature": 2.0, "top_p": 0.9, "min_p": 0.05}],
)
def test_draws_follow_the_distribution(backend: str, setting: dict[str, float], device: torch.device) -> None:
    """By chi-squared, as standard deviations (Wilson and Hilferty 1931). Both paths draw the same: see below."""
    logits = torch.linspace(-2.0, 2.0, 30)[torch.randperm(30, generator=torch.Generator().manual_seed(1))]
    rows = 1500
    made = choices(30, device, *({**setting, "seed": seed, "step": 7 * seed} for seed in range(rows)))
    drawn = torch.cat([sample(logits.to(device).repeat(rows, 1), made, backend=backend)[0] for _ in range(2)])
    scores = logits / setting["temperature"]
    kept = kept_reference(scores, int(setting.get("top_k", 0)), setting.get("top_p", 1.0), setting.get("min_p", 0.0))

    def deviations(scores: Tensor) -> float:
        expected = scores[kept].double().softmax(0) * 2 * rows
        counts = torch.bincount(drawn.cpu(), minlength=30)[kept]
        assert counts.sum() == 2 * rows, "nothing else is drawn"
        freedom = len(counts) - 1
        statistic = float(((counts - expected) ** 2 / expected).sum())
        return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))

    assert abs(deviations(scores)) < 4
    assert deviations(scores * 0.4) > 6, "the statistic would notice another temperature"


def test_all_backends_draw_the_same_tokens_and_leave_the_same_state(device: torch.device, poisoned: None) -> None:
    vocab = 5000
    settings = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.0, "penalty": 1.8},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "seed": 2**63 - 7, "step": 2**32 + 1},
        {"temperature": 1.2, "penalty": 1.3, "top_p": 0.7, "seed": 11, "step": 3},
        {"temperature": 2.0, "penalty": 0.7, "min_p": 0.1, "seed": 12},
    ]
    torch.manual_seed(3)
    logits = torch.randn(len(settings), vocab) * 4
    ours, *others = (choices(vocab, on, *settings) for on in (device, *2 * [torch.device("cpu")]))
    theirs, eager = others
    seen = torch.rand(len(settings), vocab) < 0.3
    for made in (ours, theirs, eager):
        made.seen.copy_(seen)
    for _ in range(4):
        ids, finite = sample(logits.to(device), ours, backend="triton")
        want = torch.empty(2, len(logits), dtype=torch.int64)
        sample_reference(logits, theirs, want)
        fast, _ = sample(logits, eager)
        assert ids.tolist() == fast.tolist() == want[0].tolist()
        assert finite.all()
        for made in (ours, eager):
            assert torch.equal(made.draws.cpu(), theirs.draws)
            assert torch.equal(made.seen.cpu(), theirs.seen)
    assert (ours.seen.cpu() & ~seen).sum(1).bool().tolist() == [row.get("penalty", 1.0) > 1.0 for row in settings]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_its_batch(backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 300, device=device)
    settings = [{"temperature": 1.5, "top_p": 0.9, "seed": 9 - index} for index in range(5)]

    def drawn(rows: list[int]) -> list[list[int]]:
        made = choices(300, device, *(settings[row] for row in rows))
        return [sample(logits[rows], made, backend=backend)[0].tolist() for _ in range(3)]

    together = drawn([0, 1, 2, 3, 4])
    assert together == drawn([0, 1, 2, 3, 4]), "seeds reproduce"
    assert [[step[3], step[1]] for step in together] == drawn([3, 1])
    assert len({step[0] for step in together}) > 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}])
def test_rows_that_are_not_finite_are_told(
    backend: str, value: float, setting: dict[str, float], device: torch.device
) -> None:
    logits = torch.zeros(3, 600, device=device)
    logits[1, 599] = value
    logits[:, 77] = 60.0
    ids, finite = sample(logits, choices(600, device, setting, setting, setting), backend=backend)
    assert finite.tolist() == [True, False, True]
    assert ids[0] == ids[2] == 77
    assert 0 <= ids[1] < 600


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_rows_take_the_lowest_id_among_equals(backend: str, device: torch.device) -> None:
    logits = torch.zeros(4, 4500, device=device)
    for row, places in enumerate([[17, 4400], [4096, 4097], [3, 2000], [0, 4499]]):
        logits[row, places] = 1.0
    made = choices(4500, device, *({"temperature": 0.0, "penalty": 1.0 + (row == 2)} for row in range(4)))
    made.seen[2, 3] = True
    ids, _ = sample(logits, made, backend=backend)
    assert ids.tolist() == [17, 4096, 2000, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_of_a_larger_tensor_are_written_and_no_others(backend: str, device: torch.device) -> None:
    torch.manual_seed(4)
    logits = torch.randn(3, 300, device=device)
    logits[1, 7] = math.nan
    settings = [{"temperature": 1.0, "seed": seed} for seed in range(3)]
    room = torch.full((2, 7), -5, device=device)
    out = room[:, 1:4]
    assert sample(logits, choices(300, device, *settings), out=out, backend=backend) is out
    assert torch.equal(out[:, ::2], sample(logits, choices(300, device, *settings))[:, ::2])
    assert out[1].tolist() == [1, 0, 1]
    assert (room[:, [0, 4, 5, 6]] == -5).all()
    for wrong in (room, out.int(), out.t()):
        with pytest.raises(ValueError, match="sample: expected out"):
            sample(logits, choices(300, device, *settings), out=wrong, backend=backend)


def test_random_words_are_those_of_philox() -> None:
    """The known answers of its authors (Random123's kat_vectors, philox4x32 of 10 rounds)."""
    words = torch.cat(philox(torch.tensor([0]), 0, 0, 0)).tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    mean = exponential(1, 2, torch.arange(100_000)).double()
    assert mean.mean() == pytest.approx(1.0, abs=0.02)
    assert mean.min() > 0


def test_what_can_not_be_sampled_is_refused(device: torch.device) -> None:
    made = choices(8, device, {"temperature": 1.0})
    with pytest.raises(ValueError, match="float32"):
        sample(torch.zeros(1, 8, dtype=torch.float64, device=device), made)
    with pytest.raises(ValueError, match=r"shape of shape \[4, 2\]"):
        sample(torch.zeros(2, 8, device=device), made)
    with pytest.raises(ValueError, match="contiguous"):
        sample(torch.zeros(1, 16, device=device)[:, ::2], made, backend="triton")
    ids, finite = sample(torch.zeros(0, 8, device=device), choices(8, device), backend="triton")
    assert ids.shape == finite.shape == (0,)
