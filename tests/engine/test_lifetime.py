"""How a Braid, its thread and its requests end: closed, interrupted, forked, forgotten, at the interpreter's exit."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from braidsdk import Braid, Context, Stream
from braidsdk.engine.scheduler import State
from braidsdk.errors import ClosedError, DeadlineError, EngineError, InputError, QueueFullError

TEXT = "The harbour opens at six. Boats wait for the tide, and the pilot for the boats. " * 3
WAIT_S = 30.0


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "braid-engine"}


@pytest.fixture
def context(random_braid: Braid) -> Context:
    composed = random_braid.compose([random_braid.register_system(TEXT)])
    composed.prepare()
    return composed


# close


def test_close_ends_whatever_other_threads_do_with_a_closed_error(
    make_braid: Callable[..., Braid], threads: Any
) -> None:
    braid = make_braid()
    context = braid.compose([braid.register_system(TEXT)])

    def register(turn: int) -> object:
        return braid.register_system(f"{TEXT} {threading.get_ident()} {turn}")

    def register_many(turn: int) -> object:
        texts = [f"{TEXT} {turn} {n}" for n in range(3)]
        return braid.register_many(texts, anchor=braid.register_system(TEXT), progress=False)

    async def atask() -> object:
        return [piece async for piece in context.astream("Well?", max_new_tokens=20)]

    work: list[Callable[[int], object]] = [
        register,
        register_many,
        lambda turn: context.ask("Well?", max_new_tokens=20),
        lambda turn: list(context.stream("Well?", max_new_tokens=20)),
        lambda turn: asyncio.run(context.aask("Well?", max_new_tokens=20)),
        lambda turn: asyncio.run(atask()),
        lambda turn: context.next_token_logits("Well?"),
        lambda turn: braid.ask_many([(context, "Well?")] * 3, max_new_tokens=20),
        lambda turn: (context.explain(), context.prepare()),
        lambda turn: (braid.stats(), braid.chunks.list(), braid.estimate([TEXT]), braid.count_tokens("So?")),
        lambda turn: braid.chunks.delete(braid.register(f"Document {turn}.")),
    ]

    def until_it_is_closed(each: Callable[[int], object]) -> BaseException:
        turn = 0
        try:
            while True:
                turn += 1
                each(turn)
        except BaseException as error:
            return error

    running = [threads.submit(until_it_is_closed, each) for each in work]
    time.sleep(0.7)
    braid.close()
    errors = [future.result(WAIT_S) for future in running]
    assert [(type(error), error) for error in errors if type(error) is not ClosedError] == []


USES: dict[str, Callable[[Braid, Context], object]] = {
    "ask": lambda braid, context: context.ask("Well?", max_new_tokens=4),
    "stream": lambda braid, context: list(context.stream("Well?", max_new_tokens=4)),
    "aask": lambda braid, context: asyncio.run(context.aask("Well?", max_new_tokens=4)),
    "ask_many": lambda braid, context: braid.ask_many([(context, "Well?")], max_new_tokens=4),
    "next_token_logits": lambda braid, context: context.next_token_logits("Well?"),
    "to_transformers_cache": lambda braid, context: context.to_transformers_cache(),
    "prepare": lambda braid, context: context.prepare(),
    "explain": lambda braid, context: context.explain(),
    "register": lambda braid, context: braid.register_system("Another text."),
    "estimate": lambda braid, context: braid.estimate([f"{TEXT} {n}" for n in range(200)], level=0),
    "delete": lambda braid, context: braid.chunks.delete(braid.chunks.list()[0]),
    "stats": lambda braid, context: braid.stats(),
    "warm_up": lambda braid, context: braid.warm_up(),
}


@pytest.mark.parametrize("checks", range(4))
@pytest.mark.parametrize("use", USES)
def test_a_call_that_finds_it_open_and_then_closed_says_that_it_is_closed(
    use: str, checks: int, make_braid: Callable[..., Braid], monkeypatch: pytest.MonkeyPatch
) -> None:
    braid = make_braid()
    context = braid.compose([braid.register_system(TEXT)])
    engine = braid._engine
    honest, left = engine.check_open, [checks]

    def check_open() -> None:
        honest()
        if not left[0]:
            braid.close()
        left[0] -= 1

    monkeypatch.setattr(engine, "check_open", check_open)
    try:
        USES[use](braid, context)
    except ClosedError:
        assert left[0] < 0, "nobody has closed it"
    finally:
        braid.close()


@pytest.mark.parametrize("held", [True, False], ids=["while it is computed", "while it waits"])
def test_close_ends_a_question(random_braid: Braid, context: Context, gate: Any, held: bool, threads: Any) -> None:
    asking = threads.submit(context.ask, "Well?", max_new_tokens=20)
    assert gate.reached.wait(WAIT_S)
    later = threads.submit(context.ask, "So?", max_new_tokens=20)
    closing = threads.submit(random_braid.close)
    time.sleep(0.05)
    assert not closing.done(), "it waits for the pass that runs"
    gate.opened.set()
    closing.result(WAIT_S)
    with pytest.raises(ClosedError):
        (asking if held else later).result(WAIT_S)


def test_streams_of_a_closed_braid_say_so_when_they_are_read(random_braid: Braid, context: Context) -> None:
    begun, fresh = context.stream("Well?", max_new_tokens=500), context.stream("Well?")
    next(begun)
    random_braid.close()
    for stream in (begun, fresh):
        with pytest.raises(ClosedError):
            list(stream)
        stream.close()
    random_braid.close()


def test_close_waits_for_its_thread_and_a_second_close_does_nothing(make_braid: Callable[..., Braid]) -> None:
    before = engine_threads()
    braid = make_braid()
    assert len(engine_threads() - before) == 1
    braid.close()
    assert engine_threads() == before
    braid.close()


def test_an_engine_that_fails_tells_everybody_who_waits(
    random_braid: Braid, context: Context, monkeypatch: pytest.MonkeyPatch, threads: Any
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a page is lost")

    opened = threading.Event()
    held = threads.submit(random_braid._engine.call, lambda: opened.wait(WAIT_S))
    asking = [threads.submit(context.ask, "Well?", max_new_tokens=n) for n in (4, 40, 400)]
    monkeypatch.setattr(random_braid._engine._loop.residency, "release", broken)
    opened.set()
    held.result(WAIT_S)
    assert len(asking[0].result(WAIT_S).token_ids) == 4, "its answer was complete"
    for each in asking[1:]:
        with pytest.raises(EngineError, match="a page is lost"):
            each.result(WAIT_S)
    with pytest.raises(ClosedError):
        context.ask("Well?")
    random_braid.close()


# who forgets a Braid


def test_close_frees_model_and_memory_of_a_braid_that_somebody_holds(make_braid: Callable[..., Braid]) -> None:
    braid = make_braid()
    context = braid.compose([braid.register_system(TEXT)])
    answer = context.stream("Well?", max_new_tokens=4)
    next(answer)
    left = [weakref.ref(each) for each in (braid._engine.model, braid._engine.pool, braid._engine.pool.kv)]
    braid.close()
    gc.collect()
    assert [each() for each in left] == [None] * 3


def test_a_braid_that_nobody_holds_ends_its_thread_and_closes_its_store(make_braid: Callable[..., Braid]) -> None:
    before = engine_threads()
    braid = make_braid()
    context = braid.compose([braid.register_system(TEXT)])
    stream = context.stream("Well?", max_new_tokens=1500)
    next(stream)
    store = braid._engine.store
    (thread,) = engine_threads() - before
    del braid, context
    gc.collect()
    assert thread.is_alive(), "the stream still needs it"
    next(stream)
    del stream
    gc.collect()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    with pytest.raises(ClosedError):
        store.stats("default")


@pytest.mark.parametrize("where", ["braid-engine", "braid-write", "braid-read"])
def test_a_braid_may_be_collected_by_one_of_its_own_threads(
    where: str, random_braid: Braid, make_braid: Callable[..., Braid], monkeypatch: pytest.MonkeyPatch
) -> None:
    system, document = (
        random_braid.register_system(TEXT),
        random_braid.register("To be computed by the first question."),
    )
    before = engine_threads()
    braid = make_braid()
    context = braid.compose([system, document])  # one is read, and one is written
    engine = braid._engine
    owner, name = {
        "braid-engine": (engine.model, "forward"),
        "braid-read": (engine.store, "stream"),
        "braid-write": (engine.store, "publish"),
    }[where]
    honest = getattr(owner, name)
    forgotten, done = threading.Event(), threading.Event()
    names = []

    def collecting(*arguments: Any) -> Any:
        if not names:
            names.append(threading.current_thread().name)
            assert forgotten.wait(WAIT_S)
            gc.collect()
            done.set()
        return honest(*arguments)

    monkeypatch.setattr(owner, name, collecting)
    (thread,) = engine_threads() - before
    gc.disable()
    try:
        stream = context.stream("Well?", max_new_tokens=1500)
        stream._submit(stream._made)
        circle: list[object] = [braid, stream]
        circle.append(circle)
        del braid, engine, context, stream, circle, owner
        forgotten.set()
        assert done.wait(WAIT_S / 3), "it waits for itself"
    finally:
        gc.enable()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert names[0].startswith(where)


def test_two_braids_answer_at_once(
    random_braid: Braid, context: Context, make_braid: Callable[..., Braid], threads: Any
) -> None:
    want = context.ask("Well?", max_new_tokens=40).token_ids
    with make_braid("other") as other:
        contexts = [context, other.compose([other.register_system(TEXT)])]

        def ask(number: int) -> tuple[int, ...]:
            return contexts[number % 2].ask("Well?", max_new_tokens=40).token_ids

        async def tasks() -> list[tuple[int, ...]]:
            answers = await asyncio.gather(*(each.aask("Well?", max_new_tokens=40) for each in contexts * 3))
            return [answer.token_ids for answer in answers]

        asking = [threads.submit(ask, number) for number in range(8)]
        assert [each.result(WAIT_S) for each in asking] == [want] * 8
        assert asyncio.run(tasks()) == [want] * 6


# tasks that are cancelled


async def _ask(context: Context) -> object:
    return await context.aask("Well?", max_new_tokens=1500)


async def _read(context: Context) -> object:
    return [piece async for piece in context.astream("Well?", max_new_tokens=1500)]


@pytest.mark.parametrize("passes_before", [1, 5])
@pytest.mark.parametrize("work", [_ask, _read])
def test_a_task_that_is_cancelled_stops_its_work(
    work: Callable[[Context], Any],
    passes_before: int,
    random_braid: Braid,
    context: Context,
    passes: Any,
    settled: Callable[[Braid], None],
) -> None:
    passes.before = lambda batch: time.sleep(0.005)
    passes.seen.clear()

    async def cancelled() -> None:
        task = asyncio.create_task(work(context))
        while len(passes.seen) < passes_before:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    settled(random_braid)
    assert len(passes.seen) < passes_before + 100, "it went on to its end"


def test_an_async_stream_that_is_left_stops_its_work(
    random_braid: Braid, context: Context, passes: Any, settled: Callable[[Braid], None]
) -> None:
    passes.before = lambda batch: time.sleep(0.005)
    passes.seen.clear()

    async def left() -> None:
        async with context.astream("Well?", max_new_tokens=1500) as stream:
            await anext(stream)

    asyncio.run(left())
    settled(random_braid)
    assert len(passes.seen) < 150, "it went on to its end"


# deadlines and a full queue


def test_a_deadline_stops_the_work(
    random_braid: Braid, context: Context, passes: Any, settled: Callable[[Braid], None]
) -> None:
    want = context.ask("Well?", max_new_tokens=8).token_ids
    passes.before = lambda batch: time.sleep(0.01)
    passes.seen.clear()
    with pytest.raises(DeadlineError, match=r"timeout_s=0\.3"):
        context.ask("Well?", max_new_tokens=1500, timeout_s=0.3)
    settled(random_braid)
    done = len(passes.seen)
    assert done < 100
    time.sleep(0.1)
    assert len(passes.seen) == done
    assert context.ask("Well?", max_new_tokens=8, timeout_s=60).token_ids == want


def test_a_deadline_ends_a_stream_between_two_pieces(random_braid: Braid, context: Context, passes: Any) -> None:
    passes.before = lambda batch: time.sleep(0.01)
    stream = context.stream("Well?", max_new_tokens=1500, timeout_s=0.3)
    with pytest.raises(DeadlineError):
        list(stream)
    assert list(stream) == []


def test_a_deadline_holds_while_the_question_waits_in_the_queue(
    make_braid: Callable[..., Braid], settled: Callable[[Braid], None], random_braid: Braid
) -> None:
    with make_braid(pool_bytes=6 * random_braid._engine.pool.page_bytes) as braid:
        context = braid.compose([braid.register_system("Short.")])
        with context.stream("Well?", max_new_tokens=500) as stream:
            next(stream)  # it has five pages of six
            with pytest.raises(DeadlineError, match="still waiting"):
                context.ask("So?", max_new_tokens=200, timeout_s=0.05)
            assert stream._request
            assert not stream._request.ended
        settled(braid)


def test_a_deadline_wakes_an_engine_that_waits_for_a_read(
    random_braid: Braid, make_braid: Callable[..., Braid], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = random_braid.register_system(TEXT)
    with make_braid() as braid:
        opened, honest = threading.Event(), braid._engine.store.stream

        def slow(*arguments: Any) -> Any:
            assert opened.wait(WAIT_S)
            return honest(*arguments)

        monkeypatch.setattr(braid._engine.store, "stream", slow)
        context = braid.compose([system])
        with pytest.raises(DeadlineError, match="still loading"):
            context.ask("Well?", timeout_s=0.1)
        opened.set()
        assert context.ask("Well?", max_new_tokens=4).usage.computed_tokens < len(system.token_ids)


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan"), float("inf"), True, "5", 1j], ids=repr)
def test_a_timeout_that_is_no_time_is_refused(context: Context, timeout_s: Any) -> None:
    with pytest.raises(InputError, match="timeout_s"):
        context.ask("Well?", timeout_s=timeout_s)


@pytest.mark.parametrize("max_queue", [0, -1, 1.0, True, "5", None], ids=repr)
def test_a_queue_that_holds_nothing_is_refused(make_braid: Callable[..., Braid], max_queue: Any) -> None:
    with pytest.raises(InputError, match="max_queue"):
        make_braid(max_queue=max_queue)


def test_one_request_more_than_may_wait_is_refused(
    make_braid: Callable[..., Braid],
    monkeypatch: pytest.MonkeyPatch,
    random_braid: Braid,
    settled: Callable[[Braid], None],
    threads: Any,
) -> None:
    pages = 6 * random_braid._engine.pool.page_bytes
    with make_braid(pool_bytes=pages, max_queue=1) as braid:
        context = braid.compose([braid.register_system("Short.")])
        want = context.ask("Well?", max_new_tokens=20).token_ids
        with context.stream("Well?", max_new_tokens=500) as stream:
            next(stream)  # it has five pages of six
            waiting = threads.submit(context.ask, "Well?", max_new_tokens=500)
            while not braid._engine.load().waiting:
                time.sleep(0.001)
            for _ in range(2):
                with pytest.raises(QueueFullError, match="max_queue"):
                    context.ask("So?", max_new_tokens=500)
        assert waiting.result(WAIT_S).token_ids[:20] == want
        settled(braid)
        assert context.ask("Well?", max_new_tokens=20).token_ids == want


def test_requests_that_come_during_one_step_are_refused_only_if_they_would_have_to_wait(
    make_braid: Callable[..., Braid], monkeypatch: pytest.MonkeyPatch, threads: Any
) -> None:
    with make_braid(max_queue=1) as braid:
        context = braid.compose([braid.register_system(TEXT)])
        want = context.ask("Well?", max_new_tokens=4).token_ids
        opened = threading.Event()
        held = threads.submit(braid._engine.call, lambda: opened.wait(WAIT_S))
        requests = [context.request("Well?", None, None, {"max_new_tokens": 4}) for _ in range(4)]
        for request in requests:
            braid._engine.submit(request)
        opened.set()
        held.result(WAIT_S)
        for request in requests:
            request.result()
            assert tuple(request.tokens) == want


# streams that are closed as they begin


class _ClosedWhileItBegins(Stream):
    """A stream that another thread closes just before it gives its request to the engine."""

    def _submit(self, request: Any) -> Any:
        self.close()
        return super()._submit(request)


def test_a_stream_that_is_closed_as_it_begins_computes_nothing_more(
    random_braid: Braid, context: Context, settled: Callable[[Braid], None]
) -> None:
    made = context.request("Well?", None, None, {"max_new_tokens": 1500})
    stream = _ClosedWhileItBegins(context._engine, made)
    assert list(stream) == []
    settled(random_braid)
    assert made.state is State.CANCELLED, "it went on to its end, and nobody can read it"


# processes


def run(script: str, environment: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HEAD + script], env=environment, capture_output=True, text=True, timeout=60, **options
    )  # fmt: skip


HEAD = f"""
import gc, os, signal, sys, threading, time
import torch
torch.set_num_threads(1)
from braidsdk import Braid
from braidsdk.errors import ClosedError, ForkedError
TEXT = {TEXT!r}
WAIT_S = 30.0

def opened(store=os.environ["STORE"]):
    return Braid(os.environ["CHECKPOINT"], store=store, device="cpu", dtype="float32")

def settle(braid):
    loop, end = braid._engine._loop, time.monotonic() + WAIT_S
    while braid._engine.load().running or loop.pool._pins:
        assert time.monotonic() < end
        time.sleep(0.01)
    braid._engine.call(loop._integrity)
    assert not loop.residency._held
    pool = loop.pool
    assert pool.used_bytes == sum(len(e.pages) for e in pool._entries.values()) * pool.page_bytes
"""


def test_ctrl_c_interrupts_who_waits_and_the_braid_stays_usable(
    script_environment: dict[str, str], ctrl_c: None
) -> None:
    done = run(
        """
braid = opened()
context = braid.compose([braid.register_system(TEXT)])
want = context.ask("Well?", max_new_tokens=8).token_ids
model = braid._engine.model
honest, passes = model.forward, []

def forward(*arguments):
    passes.append(1)
    time.sleep(0.01)
    if len(passes) == 10:
        os.kill(os.getpid(), signal.SIGINT)
    return honest(*arguments)

model.forward = forward

def stream():
    for _ in context.stream("Well?", max_new_tokens=1500):
        pass

def register():
    braid.register_many([f"{TEXT} {n}" for n in range(40)], anchor=braid.register_system(TEXT), progress=False)

waits = {
    "ask": lambda: context.ask("Well?", max_new_tokens=1500),
    "ask_many": lambda: braid.ask_many([(context, "Well?")] * 3, max_new_tokens=1500),
    "stream": stream,
    "register": register,
}
for name, wait in waits.items():
    passes.clear()
    if name == "register":
        passes += [1] * 8
    try:
        wait()
    except KeyboardInterrupt:
        print(name, "interrupted")
    settle(braid)
    count = len(passes)
    assert count < 100, count
    time.sleep(0.05)
    assert len(passes) == count
    passes += [1] * 100
    assert context.ask("Well?", max_new_tokens=8).token_ids == want
""",
        script_environment,
    )
    assert done.stderr == ""
    assert done.stdout.split("\n")[:-1] == [f"{each} interrupted" for each in ("ask", "ask_many", "stream", "register")]
    assert done.returncode == 0


@pytest.mark.parametrize("job", ["publish", "stream"])
def test_the_store_at_work_at_exit_says_that_it_is_closed(job: str, script_environment: dict[str, str]) -> None:
    done = run(
        f"""
import concurrent.futures
braid = opened()
system = braid.register_system(TEXT)
braid.close()
braid = opened()
honest, begun = braid._engine._loop._store.{job}, threading.Event()

def late(*arguments):
    begun.set()
    while not concurrent.futures.thread._shutdown:
        time.sleep(0.001)
    return honest(*arguments)

braid._engine._loop._store.{job} = late

def ask():
    try:
        braid.compose([system, *map(braid.register, (TEXT, TEXT + "!"))]).ask("Well?", max_new_tokens=2)
    except ClosedError as error:
        print(str(error).split(":")[0])

threading.Thread(target=ask).start()
begun.wait(WAIT_S)
""",
        script_environment,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("The interpreter exits\n", "", 0)


def test_a_fork_says_so_while_the_parent_is_busy_and_goes_on(script_environment: dict[str, str]) -> None:
    done = run(
        """
import warnings
warnings.simplefilter("ignore")
braid = opened()
context = braid.compose([braid.register_system(TEXT)])
want = context.ask("Well?", max_new_tokens=8).token_ids
stream = context.stream("Well?", max_new_tokens=1500)
next(stream)
stop = threading.Event()

def busy():
    while not stop.is_set():
        assert context.ask("Well?", max_new_tokens=8).token_ids == want
        braid.chunks.list()

threads = [threading.Thread(target=busy) for _ in range(2)]
for each in threads:
    each.start()
uses = {
    "ask": lambda: context.ask("Well?"),
    "stream": lambda: list(context.stream("Well?")),
    "begun": lambda: next(stream),
    "register": lambda: braid.register("Text."),
    "chunks": lambda: braid.chunks.list(),
    "stats": lambda: braid.stats(),
    "explain": lambda: context.explain(),
}
children = []
for turn in range(3):
    time.sleep(0.05)
    child = os.fork()
    if not child:
        signal.alarm(40)
        try:
            for name, use in uses.items():
                try:
                    use()
                except ForkedError:
                    continue
                print(name, "did not raise", flush=True)
            stream.close()
            gc.collect()
            braid.close()
            braid.close()
            torch.set_num_threads(1)
            with opened(os.environ["STORE"] + str(turn)) as other:
                there = other.compose([other.register_system(TEXT)])
                assert there.ask("Well?", max_new_tokens=8).token_ids == want
            print("forked", flush=True)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        if turn == 2:
            sys.exit(0)
        os._exit(0)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
assert braid.stats().running >= 1
next(stream)
stream.close()
stop.set()
for each in threads:
    each.join()
settle(braid)
braid.close()
print("codes", codes)
""",
        script_environment,
    )
    assert done.stderr == ""
    assert done.stdout.split("\n")[:-1] == ["forked"] * 3 + ["codes [0, 0, 0]"]


@pytest.mark.parametrize("what", ["streams", "registration", "tasks"])
def test_an_interpreter_may_exit_with_anything_open(what: str, script_environment: dict[str, str]) -> None:
    started = time.monotonic()
    done = run(
        {
            "streams": """
braid = opened()
system = braid.register_system(TEXT)
context = braid.compose([system])
streams = [context.stream(f"Well {n}?", max_new_tokens=1500) for n in range(3)]
for stream in streams:
    next(stream)
late = [braid.compose([system, braid.register(f"Document {n}.")]).stream("So?", max_new_tokens=9) for n in range(9)]
for each in late:  # what they compute is to be written
    each._submit(each._made)
print("there")
""",
            "registration": """
braid = opened()
system = braid.register_system(TEXT)

def register():
    try:
        braid.register_many([f"{TEXT} {n}" for n in range(400)], anchor=system, progress=False)
    except ClosedError:
        pass

threading.Thread(target=register, daemon=True).start()
while braid._engine.load().steps < 3:
    time.sleep(0.01)
print("there")
""",
            "tasks": """
import asyncio
braid = opened()
context = braid.compose([braid.register_system(TEXT)])

async def leave():
    asking = [asyncio.create_task(context.aask("Well?", max_new_tokens=1500)) for _ in range(3)]
    stream = context.astream("Well?", max_new_tokens=1500)
    await anext(stream)
    return asking, stream

asyncio.run(leave())
print("there")
""",
        }[what],
        script_environment,
    )
    assert (done.stdout, done.stderr) == ("there\n", "")
    assert done.returncode == 0
    assert time.monotonic() - started < 30


def test_an_exit_while_a_fake_braid_is_open_is_quiet(script_environment: dict[str, str]) -> None:
    done = run(
        """
from braidsdk.testing import FakeBraid
braid = FakeBraid()
stream = braid.stream("Well?", chunks=[braid.register_system("Short.")])
next(stream)
print("there")
""",
        {**script_environment, "PYTHONWARNINGS": "ignore::ResourceWarning"},
    )
    assert (done.stdout, done.stderr, done.returncode) == ("there\n", "", 0)


def test_only_the_engine_has_openmp_threads(script_environment: dict[str, str]) -> None:
    """A second thread's would let its own sleep between operations: a fifth of the speed on a CPU."""
    done = run(
        """
import psutil

def native():
    return len(psutil.Process().threads()) - threading.active_count()

torch.set_num_threads(3)
before = native()
with Braid("braid-tiny", store=os.environ["STORE"], device="cpu", kernels="torch") as braid:
    docs = braid.register_many([f"Line {n} of the text. " * 60 for n in range(4)], progress=False)
    context = braid.compose(docs)
    context.ask("Well?", max_new_tokens=4)
    time.sleep(0.1)
    print(native() - before)
with Braid("braid-tiny", store=os.environ["STORE"], device="cpu", kernels="torch") as braid:
    braid.ask("Well?", chunks=[chunk for chunk in braid.chunks], max_new_tokens=4)
    time.sleep(0.1)
    print(native() - before)
""",
        {**script_environment, "PYTHONWARNINGS": "ignore::UserWarning", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert (done.stdout, done.stderr) == ("2\n2\n", "")
