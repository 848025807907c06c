"""What goes from the engine's thread to a caller's leads to no tensor of the engine.

Whoever lets go of a tensor last frees its memory. That must not wait for a caller's exception; and a daemon thread that
frees one while the interpreter exits ends the process by SIGABRT.
"""

import gc
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch

from braidsdk import Braid
from braidsdk.engine.engine import _Call
from braidsdk.engine.request import without_frames
from braidsdk.errors import BraidError, ClosedError, StoreError

WAIT_S = 30.0
TEXT = "The harbour opens at six. Boats wait for the tide, and the pilot for the boats. "


def tensors_behind(root: object) -> list[list[str]]:
    """How one gets to each tensor that an object keeps alive: the types on the way."""
    way: dict[int, tuple[object, int | None]] = {id(root): (root, None)}
    left, found = [root], []
    while left:
        each = left.pop()
        if isinstance(each, torch.Tensor):
            names: list[str] = []
            at: int | None = id(each)
            while at is not None:
                thing, at = way[at]
                names.append(type(thing).__name__)
            found.append(names[::-1])
        elif not isinstance(each, ModuleType | type | FunctionType):
            for other in gc.get_referents(each):
                if id(other) not in way:
                    way[id(other)] = other, id(each)
                    left.append(other)
    return found


def test_a_tensor_is_found_behind_an_object() -> None:
    assert tensors_behind({"a": [torch.ones(1)]}) == [["dict", "list", "Tensor"]]


@pytest.mark.parametrize("what", ["ask", "stream", "register_many", "to_transformers_cache"])
def test_the_error_of_a_call_that_close_ends_leads_to_no_tensor(
    what: str, random_braid: Braid, gate: Any, threads: Any
) -> None:
    braid, engine = random_braid, random_braid._engine
    gate.opened.set()
    system = braid.register_system(TEXT)
    context = braid.compose([system, braid.register(f"{TEXT}2")])
    gate.opened.clear()
    gate.reached.clear()
    texts = [f"{TEXT * 4} {n}" for n in range(60)]
    calls: dict[str, Any] = {
        "ask": lambda: context.ask("Well?", max_new_tokens=9),
        "stream": lambda: list(context.stream("Well?", max_new_tokens=9)),
        "register_many": lambda: braid.register_many(texts, anchor=system, progress=False),
        "to_transformers_cache": lambda: context.to_transformers_cache(),
    }
    call = threads.submit(calls[what])
    assert gate.reached.wait(WAIT_S)
    engine._stop()
    gate.opened.set()
    braid.close()
    error = call.exception(WAIT_S)
    assert isinstance(error, ClosedError)
    assert error.__traceback__
    assert [" > ".join(way) for way in tensors_behind(error.__traceback__.tb_next)] == []


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """An error that was raised where a tensor is."""
    tensor = torch.ones(1)
    try:
        if cause:
            raise error from cause
        raise error
    except BaseException as caught:
        assert tensor.numel()
        return caught


def test_an_error_for_another_thread_keeps_its_causes_without_frames() -> None:
    cause = raised(OSError("no"))
    error = raised(StoreError("the store can't be written"), cause)
    error.__context__ = cause
    cause.__context__ = error  # a circle ends
    assert tensors_behind(error)
    assert without_frames(error) is error
    assert error.__cause__ is cause
    assert tensors_behind(error) == []
    assert not hasattr(error, "__notes__")
    (note,) = cause.__notes__
    assert "in raised" in note
    assert "raise error" in note


def test_what_an_error_with_a_cause_came_in_the_middle_of_keeps_no_frames_either() -> None:
    error = raised(StoreError("the store can't be written"), raised(OSError("no")))
    error.__context__ = ExceptionGroup("several", [raised(ValueError("one")), raised(ValueError("two"))])
    assert tensors_behind(error)
    assert tensors_behind(without_frames(error)) == []


@pytest.mark.parametrize("error", [RuntimeError("broken"), BraidError("refused")])
def test_what_a_job_for_the_engine_raises_comes_without_its_frames(error: Exception, random_braid: Braid) -> None:
    def work() -> None:
        tensor = torch.ones(1)
        assert tensor.numel()
        raise error

    call = _Call(work)
    call.run()
    with pytest.raises(type(error)) as caught:
        call.result()
    assert [each.name for each in caught.traceback][-1] == "result"
    assert tensors_behind(caught.value.__traceback__.tb_next) == []  # type: ignore[union-attr]


def test_a_closed_pool_that_somebody_holds_has_no_tensor(random_braid: Braid) -> None:
    random_braid.compose([random_braid.register_system(TEXT)]).ask("Well?", max_new_tokens=2)
    pool = random_braid._engine.pool
    random_braid.close()
    assert tensors_behind(pool) == [["Pool", "Tensor"]]
    assert pool.kv.numel() == 0
    assert pool.page_bytes
