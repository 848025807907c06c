"""The engine's handle: how any thread reaches the thread that serves every request (`loop.py`).

Callers submit requests and read their events.
"""

import asyncio
import os
import weakref
from collections.abc import Callable, Sequence, Set
from copy import copy
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, Literal, Self, TypeVar

from braidsdk.cache.certificates import Certificates
from braidsdk.cache.codecs import plain
from braidsdk.cache.pool import Pool
from braidsdk.cache.rates import Rates
from braidsdk.compose.composition import Composition
from braidsdk.engine.graph_runner import GraphRunner
from braidsdk.engine.loop import Loop, closed, deleted
from braidsdk.engine.request import Request, without_frames
from braidsdk.errors import ForkedError
from braidsdk.models.base import Model
from braidsdk.prompt.history import SpokenTurns
from braidsdk.prompt.layout import PromptLayout
from braidsdk.prompt.lru import LRU
from braidsdk.store import ChunkStore, EntryKey, Hit, ModelIdentity
from braidsdk.store.threads import Threads

MAX_QUEUE = 1024
"""How many requests may wait, unless the Braid says otherwise."""

PREPARING_THREADS = 2
"""Threads that check and tokenize what event loops ask for."""

T = TypeVar("T")


@dataclass(frozen=True)
class Load:
    """How busy the engine is.

    Attributes:
        running: requests that are admitted and have not ended.
        waiting: requests that wait for admission.
        steps: steps so far.
        step_tokens: tokens that all steps computed, in prefill or decoding.
        last_step_rows: rows that decoded in the last step.
    """

    running: int
    waiting: int
    steps: int
    step_tokens: int
    last_step_rows: int


class Engine:
    """The handle that an open Braid holds, and the way to its thread. Any thread may use it.

    The thread ends when there is no reference to the handle any more.

    Attributes:
        turns: the ids of past answers, for conversations that go on.
        rates: how fast this model was on this device.
        certificates: what was measured of this model's modes.
        counted: whether hits and misses of this namespace are counted.
    """

    _first: "Engine | None" = None

    def __init__(
        self,
        model: Model,
        layout: PromptLayout,
        store: ChunkStore,
        pool: Pool,
        namespace: str,
        *,
        max_queue: int = MAX_QUEUE,
    ) -> None:
        self.layout = layout
        self.store = store
        self.namespace, self.counted = namespace, True
        self.config = model.config
        self.device, self.dtype, self.backends = model.device, model.dtype, model.backends
        self.geometry = model.geometry
        self.identity = ModelIdentity(
            weights=model.fingerprint,
            tokenizer=layout.fingerprint,
            dtype=str(model.dtype).removeprefix("torch."),
            codec=plain.NAME,
            layers=model.config.layers,
            kv_heads=model.config.kv_heads,
            head_dim=model.config.head_dim,
            rope=model.config.rope,
        )
        prefix = f"rate:{self.identity.weights}:{self.identity.dtype}:{model.device}"
        self.rates = Rates(prefix, store.recall(Rates.keys(prefix)))
        self._remember_apart()
        self._process = os.getpid()
        self._preparing = Threads(PREPARING_THREADS, "braid-prepare")
        self._loop = Loop(model, pool, store, self.identity, self.rates, max_queue)
        self._stop = weakref.finalize(self, self._loop.stop)
        self._loop.start()

    def in_namespace(self, namespace: str, *, counted: bool) -> Self:
        """A handle of the same thread, model, memory and store for another namespace. What one remembers of texts, keys
        and turns the other does not see."""
        other = copy(self)
        other._first = self  # the thread ends with the handle that began it
        other.namespace, other.counted = namespace, counted
        other._remember_apart()
        other.layout = self.layout.apart()
        return other

    def _remember_apart(self) -> None:
        """Remember nothing yet of this namespace."""
        self.turns = SpokenTurns()
        self.certificates = Certificates(self.store, self.identity, self.namespace)
        self._recent_keys: LRU[tuple[object, ...], EntryKey] = LRU()

    @property
    def model(self) -> Model:
        """The model. Only the engine's thread computes with it, and other threads do not hold it: whoever lets go of it
        last frees its memory.

        Raises:
            ClosedError: `close` was called.
        """
        return self._owned("model")  # type: ignore[no-any-return]

    @property
    def pool(self) -> Pool:
        """The pool, to read its numbers. Only the engine's thread changes it.

        Raises:
            ClosedError: `close` was called.
        """
        return self._owned("pool")  # type: ignore[no-any-return]

    @property
    def hits(self) -> int:
        """Entries that calls of this namespace found, in memory or store."""
        return self._loop.residency.hits[self.namespace]

    @property
    def misses(self) -> int:
        """Entries that calls of this namespace had to compute."""
        return self._loop.residency.misses[self.namespace]

    def check_process(self) -> None:
        """Check that this is the process that opened it. Takes no lock: in a fork, a thread that does not exist there
        may hold it.

        Raises:
            ForkedError: this is a fork of the process that opened it.
        """
        if os.getpid() != self._process:
            raise ForkedError(
                "A Braid must be used in the process that opened it; got a fork of that process. Open another Braid "
                "here."
            )

    def check_open(self) -> None:
        """Check that this is the process that opened it, and that it is open. Takes no lock.

        Raises:
            ForkedError: this is a fork of the process that opened it.
            ClosedError: `close` was called.
        """
        self.check_process()
        if not self._loop.open:
            raise closed()

    def close(self) -> None:
        """End every request with ClosedError, free memory and close the store. Safe to call twice. In a fork it does
        nothing."""
        self._stop()
        self._loop.join()

    def submit(self, request: Request) -> Request:
        """Give a request to the engine, and return it; its events can then be read.

        Raises:
            ClosedError: `close` was called.
            PoolFullError: it needs more memory than the pool has.
        """
        self.check_open()
        self.pool.check_fits(
            (len(key.token_ids) for key in set(request.keys)), (request.reserved, request.scratch, request.overlay)
        )
        self._loop.send(partial(self._loop.submit, request), partial(self._loop.refuse, request))
        return request

    def cancel(self, request: Request) -> None:
        """End a request that is not wanted any more, after the current step. Never blocks, so the garbage collector may
        call it at any point in any thread."""
        if not request.ended and os.getpid() == self._process:
            self._loop.post(partial(self._loop.cancel, request))

    def run(self, request: Request) -> object:
        """Submit a request and wait for its result. An interrupt cancels the request."""
        try:
            self.submit(request)
            return request.result()
        except BaseException:
            self.cancel(request)
            raise

    def call(self, work: Callable[[], T]) -> T:
        """Run something in the engine's thread between two steps, and wait for what it returns or raises.

        Raises:
            ClosedError: `close` was called.
        """
        self.check_open()
        call = _Call(work)
        self._loop.send(call.run, call.refuse)
        return call.result()

    async def beside_the_loop(self, work: Callable[[], T]) -> T:
        """Prepare a call (its texts and keys, and a look into the store) in a thread, so that the caller's event loop
        is not blocked. There are few threads, because more would only contend for the interpreter and the index.

        Raises:
            ClosedError: `close` was called.
        """
        self.check_open()
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work)

    def load(self) -> Load:
        """How busy the engine is."""
        loop = self._loop
        running, waiting = loop.scheduler.admitted, loop.scheduler.waiting
        return Load(running, waiting, loop.steps, loop.step_tokens, loop.last_step_rows)

    def keys(self, composition: Composition, known: Sequence[EntryKey] = ()) -> tuple[EntryKey, ...]:
        """The key of each segment's entry. `known` are the keys of the first segments, if the caller has them."""
        return composition.keys(self.identity, self.namespace, known, self._recent_keys)

    def locate(self, keys: Sequence[EntryKey]) -> list[Literal["memory"] | Hit | None]:
        """Where each entry is, without loading or computing any. None means nowhere."""
        found = dict(zip(keys, self.store.look_up(keys), strict=True))
        return ["memory" if self.pool.find(key) else found[key] for key in keys]

    def check_chunks(self, composition: Composition) -> None:
        """Refuse a composition with a deleted chunk, and forget what was computed after it.

        Raises:
            UnknownChunkError: this or another process has deleted a chunk.
        """
        labels = {segment.chunk_id: segment.label for segment in composition.segments if segment.chunk_id}
        gone = labels.keys() - self.store.known_chunks(self.namespace, labels)
        if gone:
            self.forget(gone)
            raise deleted([labels[chunk_id] for chunk_id in sorted(gone)])

    def forget(self, chunk_ids: Set[str]) -> None:
        """Drop the entries of deleted chunks, and refuse waiting requests that need one."""
        self.call(partial(self._loop.forget, chunk_ids))

    def warm_up(self, requests: int) -> "list[Callable[[], object]]":
        """Functions to `call` one by one. After them no question waits for a compiler or a capture; see `Graphs`."""
        runner = self._owned("runner")
        return list(runner.graphs.warm_up(requests)) if isinstance(runner, GraphRunner) else []

    def launches(self) -> dict[str, int]:
        """How many kernels each captured pass launches. Empty if the model does not run on CUDA graphs."""
        runner = self._owned("runner")
        return self.call(runner.graphs.launches) if isinstance(runner, GraphRunner) else {}

    def _owned(self, name: str) -> Any:
        """A part that the loop owns until it ends."""
        try:
            return getattr(self._loop, name)
        except AttributeError:
            raise closed() from None


class _Call(Generic[T]):
    """A function to run in the engine's thread, and its result."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._result: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run(self) -> None:
        try:
            self._result.put((self._work(), None))
        except BaseException as error:
            self.refuse(error)

    def refuse(self, error: BaseException) -> None:
        self._result.put((None, without_frames(error)))

    def result(self) -> T:
        value, error = self._result.get()
        if error is not None:
            raise error
        return value  # type: ignore[return-value]  # what `work` returned
