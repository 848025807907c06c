"""The beginning and the end of a step against their references, in Triton's interpreter where there is no GPU."""

import pytest
import torch

from braidsdk.kernels.step import begin_step, end_step


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize(("size", "half"), [(96, 12), (160, 64), (1024, 48)])
def test_rows_are_those_of_the_reference(tokens, size, half, dtype, device, seed, poisoned, fenced) -> None:
    embedding = torch.randn(50, size, device=device).to(dtype)
    cos, sin = torch.rand(2, 33, half, device=device)
    slots = torch.randint(1000, (tokens, 29), device=device)
    token_ids, frames = torch.randint(50, (tokens,), device=device), torch.randint(29, (tokens,), device=device)
    token_ids[0], frames[0], frames[-1] = 49, 28, -1
    for given in (slots, slots[:, 3].contiguous()):
        want = begin_step(token_ids, frames, given, embedding, cos, sin)
        got = begin_step(token_ids, frames, given, fenced(embedding), fenced(cos), fenced(sin), backend="triton")
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
    where = begin_step(token_ids, frames, slots, embedding, cos, sin)[3].tolist()
    assert where == [int(slots[row, frame]) if frame >= 0 else -1 for row, frame in enumerate(frames.tolist())]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rows", [1, 5, 64, 65])
def test_rows_move_on_and_empty_ones_stay(rows, backend, device) -> None:
    room = torch.arange(100, 240, device=device).view(2, 70)
    room[1, 0], room[1, 3::7] = 0, -1
    before, state = room.clone(), room[:, :rows]
    end_step(state, backend=backend)
    moved = (before[1] >= 0) & (torch.arange(70, device=device) < rows)
    assert torch.equal(room, before + moved)


def test_nothing_to_begin_with(device) -> None:
    none, table = torch.empty(0, dtype=torch.int64, device=device), torch.zeros(4, 8, device=device)
    begun = begin_step(none, none, none, table, table, table, backend="triton")
    assert [len(each) for each in begun] == [0, 0, 0, 0]
    end_step(torch.empty(2, 0, dtype=torch.int64, device=device), backend="triton")


def test_what_does_not_fit_is_refused(device) -> None:
    two, table = torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(4, 8, device=device)
    for message, arguments in {
        "frames of shape": (two, two[:1], two, table, table, table),
        "slots of shape": (two, two, two.view(1, 2), table, table, table),
        "sin of shape": (two, two, two, table, table, table[:2]),
        "token_ids contiguous, torch.int64": (two.int(), two, two, table, table, table),
        "cos contiguous, torch.float32": (two, two, two, table, table.half(), table),
    }.items():
        with pytest.raises(ValueError, match=message):
            begin_step(*arguments, backend="triton")
    with pytest.raises(ValueError, match="state of shape"):
        end_step(two.view(1, 2))
