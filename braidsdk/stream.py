"""An answer as it arrives: ids to text, stop strings, closing."""

from collections.abc import Generator
from inspect import GEN_RUNNING, getgeneratorstate
from threading import RLock
from types import TracebackType
from typing import Self

from braidsdk.compose import Composition
from braidsdk.decoding import Decoder
from braidsdk.engine import Engine
from braidsdk.errors import BraidError
from braidsdk.generate import Outcome, generate
from braidsdk.history import Spoken
from braidsdk.sampling import SamplingParams
from braidsdk.stop_strings import StopStrings
from braidsdk.store import EntryKey
from braidsdk.types import Answer


class Stream:
    """An answer that arrives in pieces of text. An iterator, and a context manager that stops generation on leaving.

    Any thread may read or close it. Closed or dropped early it gives back the memory that it holds.
    """

    def __init__(
        self,
        engine: Engine,
        composition: Composition,
        keys: tuple[EntryKey, ...],
        params: SamplingParams,
        *,
        queued: bool = False,
        started: float | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self._layout = engine.layout
        self._turns = engine.turns
        self._composition = composition
        self._lock = RLock()
        tokens = generate(engine, composition, keys, params, queued=queued, started=started, decoder=decoder)
        self._ids = _Ids(tokens, params.stop_ids)
        self._pieces = self._layout.decode_stream(self._ids)
        self._stop = StopStrings(params.stop)
        self._text = ""
        self._ended = False

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            BraidError: the stream has not ended, or was closed before its end.
        """
        outcome = self._ids.outcome
        if outcome is None or not self._ended:
            raise BraidError("The answer is not complete. Read the stream to its end first.")
        return Answer(
            text=self._text,
            token_ids=tuple(self._ids.seen),
            prompt_ids=self._composition.input_ids,
            finish_reason="stop" if self._stop.found else outcome.finish_reason,
            usage=outcome.usage,
            timings=outcome.timings,
        )

    def stop(self) -> None:
        """Let generation end after the step that runs. Never waits; whoever reads the stream, or `close`, then frees
        what the call holds."""
        self._ids.closed = True

    def close(self) -> None:
        """Stop generating and free what the call holds; while another thread reads, after the step that runs. Safe to
        call twice."""
        self.stop()
        with self._lock:
            self._ids.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while (shown := self.step()) is not None:
            if shown:
                return shown
        raise StopIteration

    def step(self) -> str | None:
        """Compute one more token.

        Returns:
            The text that can be shown since then, "" if there is none; None once there are no more tokens.
        """
        with self._lock:
            if self._ended or self._ids.closed:
                return None
            piece = next(self._pieces, None)
            shown = self._stop.flush() if piece is None else self._stop.feed(piece)
            self._text += shown
            if piece is None or self._stop.found:
                self._ended = True
                self._remember()
            return shown

    def _remember(self) -> None:
        """End generation if a stop string did, and keep the ids of the text for the conversation's next turn."""
        ids = self._ids.spoken()
        if self._stop.found:
            while ids and len(self._layout.decode(ids)) > len(self._text):
                ids = ids[:-1]
            self._ids.end(len(ids))
        # A text that ends within a token has no ids of its own; its turn is then encoded from the text.
        if self._ids.outcome and self._layout.decode(ids) == self._text:
            computed = min(len(ids), len(self._ids.seen) - 1)
            self._turns.remember(self._composition.tail, self._text, Spoken(ids, computed))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Ids:
    """The ids that an answer's text is made of, one at a time.

    Knows no stream: without a cycle of references, a stream that is dropped is freed at once.

    Attributes:
        seen: all ids generated so far, the closing one included.
        outcome: what generation returned, once it has ended by itself.
        closed: set to let it end before its next step.
    """

    def __init__(self, tokens: Generator[int, int | None, Outcome], stop_ids: frozenset[int]) -> None:
        self.seen: list[int] = []
        self.outcome: Outcome | None = None
        self.closed = False
        self._tokens = tokens
        self._stop_ids = stop_ids

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        while not self.closed and self.outcome is None:
            try:
                token = next(self._tokens)
            except StopIteration as end:
                self.outcome = end.value
                break
            self.seen.append(token)
            if token not in self._stop_ids:
                return token
        if self.closed:  # from within the step that has just ended
            self.close()
        raise StopIteration

    def spoken(self) -> tuple[int, ...]:
        """All ids but the one that closed the answer."""
        return tuple(self.seen[:-1] if self.seen and self.seen[-1] in self._stop_ids else self.seen)

    def end(self, kept: int) -> None:
        """End generation, unless it has ended; its text is made of the first `kept` ids."""
        if self.outcome is None:
            try:
                self._tokens.send(kept)
            except StopIteration as end:
                self.outcome = end.value

    def close(self) -> None:
        """Free what generation holds; nothing if this very thread is within a step of it."""
        if getgeneratorstate(self._tokens) != GEN_RUNNING:
            self._tokens.close()
