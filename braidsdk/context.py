"""A composed context: ask it questions, see what it would take from the cache."""

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Literal, Unpack

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from braidsdk.async_stream import AsyncStream, Cancellation
from braidsdk.compose import Composition, check_window
from braidsdk.decoding import Decoder
from braidsdk.engine import Engine
from braidsdk.generate import tail_logits
from braidsdk.handover import to_dynamic_cache
from braidsdk.history import conversation, parse_history
from braidsdk.pool import Resident
from braidsdk.sampling import SamplingOptions, resolve
from braidsdk.store import EntryKey, Hit
from braidsdk.stream import Stream
from braidsdk.types import Answer, ExplainedChunk, Explanation

History = Sequence[Mapping[str, str]]
"""A conversation's past: {"role": "user", "content": ...}, {"role": "assistant", "content": ...}, and so on."""


class Context:
    """What `Braid.compose` returns: a composition and the engine that can answer over it.

    It holds no memory of its own: entries are pinned only while a call runs. Making one for every set of chunks is as
    cheap as tokenizing them. Several threads may use it: calls that give a whole answer queue, streams take turns with
    them token by token.
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

    def prompt_ids(self, question: str, *, history: History | None = None) -> tuple[int, ...]:
        """Token ids of the whole prompt, question included: what a full prefill would be given. Takes and raises what
        `ask` does."""
        return self._prompt(question, history)[0].input_ids

    def ask(self, question: str, *, history: History | None = None, **options: Unpack[SamplingOptions]) -> Answer:
        """Answer a question over this context; greedily, unless a temperature is given.

        Args:
            question: plain text; control tokens in it are plain characters.
            history: the conversation so far, from its first question to its last answer, by turns of user and
                assistant. The chunks stand before its first question. What is resident of it is not computed again:
                as a rule all of it, when it is what this Braid answered last.
            **options: max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop, stop_ids; see
                `braidsdk.sampling.SamplingOptions`.

        Raises:
            InputError: the history or an option can't be used.
            EmptyTextError: the question is empty, or a message of the history.
            WindowExceededError: context, history, question and `max_new_tokens` exceed the model's window.
            PoolFullError: the context does not fit in the KV pool beside what running streams hold.
            NumericsError: the model gave NaN or infinite logits.
            StoreError: what was computed can't be written.
        """
        started = perf_counter()
        with self._stream(question, history, options, started) as stream, self._engine.calls:
            return _read(stream)

    def stream(self, question: str, *, history: History | None = None, **options: Unpack[SamplingOptions]) -> Stream:
        """Answer a question piece by piece; takes and raises what `ask` does.

        Nothing is computed before the first piece is asked for. `stream.answer` holds the whole answer once it has
        ended; closing it early stops generation.
        """
        return self._stream(question, history, options)

    async def aask(
        self, question: str, *, history: History | None = None, **options: Unpack[SamplingOptions]
    ) -> Answer:
        """`ask` for an event loop, which is never blocked: the work is done in a thread.

        A cancelled task returns at once; generation stops after the step that runs, and what it holds is freed.
        """
        started, cancellation = perf_counter(), Cancellation()

        def work() -> Answer:
            with cancellation.watch(self._stream(question, history, options, started)) as stream, self._engine.calls:
                return _read(stream)

        return await self._engine.workers.answer(work, cancellation.cancel)

    def astream(
        self, question: str, *, history: History | None = None, **options: Unpack[SamplingOptions]
    ) -> AsyncStream:
        """`stream` for an event loop: `async for piece in context.astream(...)`.

        The loop is never blocked: the work is done in a thread. What `ask` raises comes with the first piece.
        `contextlib.aclosing` or `async with` stops generation when the block is left.
        """
        return AsyncStream(self._engine.workers, lambda: self._stream(question, history, options))

    def next_token_logits(self, question: str, *, history: History | None = None) -> Tensor:
        """Logits of the answer's first token, [vocab_size], float32 on the CPU (float64 for a float64 model).

        Raises what `ask` does.
        """
        composition, keys = self._prompt(question, history)
        with self._engine.calls:
            logits = tail_logits(self._engine, composition, keys)
        return logits.cpu().clone()  # a plain tensor, free to be changed: the model's own is an inference tensor

    def prepare(self) -> int:
        """Compute now what the first question would have to, and store what the mode keeps.

        Returns:
            Number of tokens computed.

        Raises:
            PoolFullError: the context does not fit in the KV pool.
            StoreError: what was computed can't be written.
        """
        with self._engine.calls, self._engine.working(), self._engine.pool.pinned(self._keys):
            return self._engine.prepare(self._composition, self._keys).computed_tokens

    def to_transformers_cache(self, config: PretrainedConfig | None = None) -> DynamicCache:
        """A fresh cache of this context for `generate` of transformers, computing what is missing of it.

        `generate` writes into the cache it is given: ask for another one each time. Give it the ids of the whole
        prompt; those of the context are not computed again:

            ids = torch.tensor([context.prompt_ids("What is the capital?")])
            cache = context.to_transformers_cache(model.config)
            model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=64)

        Args:
            config: of the transformers model, `model.config`.

        Returns:
            Per layer keys at absolute positions and values, [1, kv_heads, tokens, head_dim], in the model's dtype and
            on its device.

        Raises:
            PoolFullError: the context does not fit in the KV pool.
            StoreError: what was computed can't be written.
        """
        engine = self._engine
        with engine.calls, engine.working(), engine.pool.pinned(self._keys):
            entries = engine.prepare(self._composition, self._keys).entries
            return to_dynamic_cache(engine.model, engine.pool, self._composition.segments, entries, config)

    def explain(self) -> Explanation:
        """What a call would find in memory or store, why it would not find the rest, and how long having all of it
        ready should take. Loads and computes nothing.

        Times are those of the rates measured in this process, or in an earlier one on this store.
        """
        rows = []
        rates = self._engine.rates
        segments = self._composition.segments
        with self._engine.working():
            places = self._engine.locate(self._keys)
            absent = [key for key, found in zip(self._keys, places, strict=True) if found is None]
            misses = dict(zip(absent, self._engine.store.explain(absent), strict=True))
            sizes = [self._engine.pool.bytes_for(len(segment.token_ids)) for segment in segments]
        for segment, key, found, kv_bytes in zip(segments, self._keys, places, sizes, strict=True):
            where: Literal["memory", "store", "nowhere"] = (
                "memory" if isinstance(found, Resident) else "store" if isinstance(found, Hit) else "nowhere"
            )
            seconds: float | None = 0.0
            if isinstance(found, Hit):
                seconds = rates.seconds_for("load", found.nbytes)
            elif found is None:
                seconds = rates.seconds_for("compute", len(segment.token_ids))
            rows.append(
                ExplainedChunk(
                    label=segment.label,
                    chunk_id=segment.chunk.id if segment.chunk else None,
                    position=segment.origin,
                    tokens=len(segment.token_ids),
                    after=tuple(segments[index].label for index in segment.after),
                    hit=where != "nowhere",
                    where=where,
                    reason=f"in {where}" if found else misses[key].detail,
                    kv_bytes=kv_bytes,
                    expected_ms=None if seconds is None else seconds * 1e3,
                )
            )
        return Explanation(self._composition.mode, tuple(rows), self._composition.notes)

    def belongs_to(self, engine: Engine) -> bool:
        """Whether this engine composed it."""
        return self._engine is engine

    def open_stream(
        self, question: str, options: SamplingOptions, *, started: float | None = None, decoder: Decoder | None = None
    ) -> Stream:
        """A stream that goes on together with others of the same decoder; its caller holds `engine.calls`."""
        return self._stream(question, None, options, started, decoder)

    def _stream(
        self,
        question: str,
        history: History | None,
        options: SamplingOptions,
        started: float | None = None,
        decoder: Decoder | None = None,
    ) -> Stream:
        """The answer of a call that began at `started` and queues, or of one that takes turns (None)."""
        composition, keys = self._prompt(question, history)
        params = resolve(options, self._engine.config, composition.tokens)
        return Stream(
            self._engine, composition, keys, params, queued=started is not None, started=started, decoder=decoder
        )

    def _prompt(self, question: str, history: History | None) -> tuple[Composition, tuple[EntryKey, ...]]:
        """This composition with a conversation's past and a question, and the keys of its segments."""
        self._engine.check_open()
        layout = self._engine.layout
        past = conversation(parse_history(history or ()), layout, self._engine.turns)
        composition = self._composition
        for turn in past.turns:
            composition = composition.with_turn(turn)
        composition = composition.with_tail(past.opening + layout.question_ids(question))
        check_window(
            composition.tokens,
            self._engine.config.window,
            "The context with this question" if not past.turns else "The context with this history and question",
            "Compose fewer chunks, or shorten the question.",
        )
        return composition, self._engine.keys(composition, self._keys)

    def __repr__(self) -> str:
        labels = ", ".join(segment.label for segment in self._composition.segments)
        return f"Context({self.mode}: {labels}; {len(self.input_ids)} tokens)"


def _read(stream: Stream) -> Answer:
    """The whole answer, once it has ended."""
    for _ in stream:
        pass
    return stream.answer
