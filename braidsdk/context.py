"""A composed context: ask it questions, see what it would take from the cache."""

from collections.abc import Iterator
from types import TracebackType
from typing import Literal, Self

from torch import Tensor

from braidsdk.compose import Composition, check_window
from braidsdk.engine import Engine
from braidsdk.errors import BraidError, InputError, WindowExceededError
from braidsdk.generate import Outcome, generate, tail_logits
from braidsdk.pool import Resident
from braidsdk.store import EntryKey, Hit, Miss
from braidsdk.types import Answer, ExplainedChunk, Explanation

DEFAULT_NEW_TOKENS = 256


class Context:
    """What `Braid.compose` returns: a composition and the engine that can answer over it.

    It holds no memory of its own: entries are pinned only while a call runs. Making one for every set of chunks is as
    cheap as tokenizing them.
    """

    def __init__(self, engine: Engine, composition: Composition) -> None:
        self._engine = engine
        self._composition = composition
        self._keys = engine.keys(composition)

    @property
    def mode(self) -> str:
        """The composition rule."""
        return self._composition.mode

    @property
    def input_ids(self) -> tuple[int, ...]:
        """Token ids of the context, in order, without a question."""
        return self._composition.input_ids

    def ask(self, question: str, *, max_new_tokens: int | None = None) -> Answer:
        """Answer a question over this context, greedily.

        Args:
            question: plain text; control tokens in it are plain characters.
            max_new_tokens: at most so many tokens are generated. None is 256, or what the window leaves.

        Raises:
            EmptyTextError: the question is empty.
            WindowExceededError: context, question and `max_new_tokens` exceed the model's window.
            PoolFullError: the context does not fit in the KV pool.
            StoreError: what was computed can't be written.
        """
        with self.stream(question, max_new_tokens=max_new_tokens) as stream:
            for _ in stream:
                pass
            return stream.answer

    def stream(self, question: str, *, max_new_tokens: int | None = None) -> "Stream":
        """Answer a question piece by piece; takes and raises what `ask` does.

        Nothing is computed before the first piece is asked for. `stream.answer` holds the whole answer once it has
        ended; closing it early stops generation.
        """
        composition = self._with_tail(question)
        room = self._engine.model.config.window - len(composition.input_ids)
        if max_new_tokens is not None and max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1; got {max_new_tokens}.")
        if max_new_tokens is not None and max_new_tokens > room:
            raise WindowExceededError(
                f"The prompt takes {len(composition.input_ids):,} tokens and leaves room for {room:,}; max_new_tokens "
                f"is {max_new_tokens:,}. Ask for fewer, or compose fewer chunks."
            )
        return Stream(self._engine, composition, self._keys, max_new_tokens or min(DEFAULT_NEW_TOKENS, room))

    def next_token_logits(self, question: str) -> Tensor:
        """Logits of the answer's first token, [vocab_size], float32 on the CPU (float64 for a float64 model).

        Raises what `ask` does.
        """
        logits = tail_logits(self._engine, self._with_tail(question), self._keys)
        return logits.cpu().clone()  # a plain tensor, free to be changed: the model's own is an inference tensor

    def prepare(self) -> int:
        """Compute now what the first question would have to, and store what the mode keeps.

        Returns:
            Number of tokens computed.

        Raises:
            PoolFullError: the context does not fit in the KV pool.
            StoreError: what was computed can't be written.
        """
        self._engine.check_open()
        with self._engine.pool.pinned(self._keys):
            return self._engine.prepare(self._composition, self._keys).computed_tokens

    def explain(self) -> Explanation:
        """What a call would find in memory or store, and why it would not find the rest. Loads and computes nothing."""
        self._engine.check_open()
        rows = []
        segments = self._composition.segments
        for segment, found in zip(segments, self._engine.locate(self._keys), strict=True):
            where: Literal["memory", "store", "nowhere"] = (
                "memory" if isinstance(found, Resident) else "store" if isinstance(found, Hit) else "nowhere"
            )
            rows.append(
                ExplainedChunk(
                    label=segment.label,
                    chunk_id=segment.chunk.id if segment.chunk else None,
                    position=segment.origin,
                    tokens=len(segment.token_ids),
                    after=tuple(segments[index].label for index in segment.after),
                    hit=where != "nowhere",
                    where=where,
                    reason=found.detail if isinstance(found, Miss) else f"in {where}",
                    kv_bytes=self._engine.pool.bytes_for(len(segment.token_ids)),
                )
            )
        return Explanation(self._composition.mode, tuple(rows), self._composition.notes)

    def _with_tail(self, question: str) -> Composition:
        self._engine.check_open()
        composition = self._composition.with_tail(self._engine.layout.question_ids(question))
        check_window(
            len(composition.input_ids),
            self._engine.model.config.window,
            "The context with this question",
            "Compose fewer chunks, or shorten the question.",
        )
        return composition

    def __repr__(self) -> str:
        labels = ", ".join(segment.label for segment in self._composition.segments)
        return f"Context({self.mode}: {labels}; {len(self.input_ids)} tokens)"


class Stream:
    """An answer that arrives in pieces of text. An iterator, and a context manager that stops generation on leaving."""

    def __init__(
        self, engine: Engine, composition: Composition, keys: tuple[EntryKey, ...], max_new_tokens: int
    ) -> None:
        self._layout = engine.layout
        self._composition = composition
        self._tokens = generate(engine, composition, keys, max_new_tokens)
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._outcome: Outcome | None = None
        self._pieces = self._layout.decode_stream(self._record())

    def _record(self) -> Iterator[int]:
        while True:
            try:
                token = next(self._tokens)
            except StopIteration as end:
                self._outcome = end.value
                return
            self._token_ids.append(token)
            yield token

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            BraidError: the stream has not ended, or was closed before its end.
        """
        if self._outcome is None:
            raise BraidError("The answer is not complete. Read the stream to its end first.")
        return Answer(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            prompt_ids=self._composition.input_ids,
            finish_reason=self._outcome.finish_reason,
            usage=self._outcome.usage,
            timings=self._outcome.timings,
        )

    def close(self) -> None:
        """Stop generating and free what the call holds. Safe to call twice."""
        self._tokens.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self._text.append(piece)
        return piece

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
