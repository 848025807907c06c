"""A composed context: ask it questions, see what it would take from the cache."""

from collections.abc import Mapping, Sequence
from numbers import Real
from time import perf_counter
from typing import TYPE_CHECKING, Literal, Unpack, cast

import torch
from torch import Tensor

from braidsdk import answer
from braidsdk.answer import AsyncStream, Stream
from braidsdk.cache.export import to_dynamic_cache
from braidsdk.cache.resident import Resident
from braidsdk.compose.composition import Composition
from braidsdk.compose.repairs import Linked, check_layers, first_tokens, overlay_key
from braidsdk.engine.engine import Engine
from braidsdk.engine.request import Request, Then
from braidsdk.engine.sampling import SamplingOptions, resolve
from braidsdk.engine.scheduler import Priority
from braidsdk.errors import InputError, shown
from braidsdk.prompt.answer_text import AnswerText
from braidsdk.prompt.history import conversation, parse_history
from braidsdk.prompt.text import check_length, check_window
from braidsdk.store import EntryKey, Hit
from braidsdk.types import Answer, ExplainedChunk, Explanation

if TYPE_CHECKING:
    from transformers import DynamicCache, PretrainedConfig

History = Sequence[Mapping[str, str]]
"""A conversation's past: {"role": "user", "content": ...}, {"role": "assistant", "content": ...}, and so on."""


class Context:
    """What `Braid.compose` returns: a composition and the engine that can answer over it.

    It holds no memory of its own: entries are pinned only while a call runs. Making one for every set of chunks is as
    cheap as tokenizing them. Any number of threads and tasks may use it: their requests share the engine's steps.
    """

    def __init__(self, engine: Engine, composition: Composition) -> None:
        check_layers(composition.repair, engine.config.layers)
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

    def ask(
        self,
        question: str,
        *,
        history: History | None = None,
        timeout_s: float | None = None,
        sources: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """Answer a question over this context; greedily, unless a temperature is given.

        Args:
            question: plain text; control tokens in it are plain characters.
            history: the conversation so far, from its first question to its last answer, by turns of user and
                assistant. The chunks stand before its first question. What is resident of it is not computed again:
                as a rule all of it, when it is what this Braid answered last.
            timeout_s: seconds after which the call fails, and the work for it stops; None is never.
            sources: whether to say where the answer came from, in `answer.sources` and `answer.token_sources`: which
                documents its tokens paid attention to. When the answer is complete, its tokens go once more through
                most of the model, together. An answer is the same with and without.
            **options: max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop, stop_ids; see
                `braidsdk.engine.sampling.SamplingOptions`.

        Raises:
            InputError: the history or an option can't be used.
            EmptyTextError: the question is empty, or a message of the history.
            WindowExceededError: context, history, question and `max_new_tokens` exceed the model's window.
            UnknownChunkError: a chunk was deleted meanwhile, by this or another process.
            PoolFullError: the context and its answer need more memory than the KV pool has.
            QueueFullError: more requests wait than `max_queue` allows.
            DeadlineError: `timeout_s` is over.
            NumericsError: the model gave NaN or infinite logits.
            StoreError: what was computed can't be written.
        """
        return answer.ask(self._engine, self.request(question, history, timeout_s, options, sources=sources))

    def stream(
        self,
        question: str,
        *,
        history: History | None = None,
        timeout_s: float | None = None,
        sources: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """Answer a question piece by piece; takes and raises what `ask` does.

        Nothing is computed before the first piece is asked for. `stream.answer` holds the whole answer once it has
        ended; closing it early stops generation.
        """
        return Stream(self._engine, self.request(question, history, timeout_s, options, sources=sources))

    async def aask(
        self,
        question: str,
        *,
        history: History | None = None,
        timeout_s: float | None = None,
        sources: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """`ask` for an event loop, which is never blocked. A cancelled task cancels its request: generation stops after
        the step that runs, and what it holds is freed."""
        return await answer.aask(
            self._engine, lambda: self.request(question, history, timeout_s, options, sources=sources)
        )

    def astream(
        self,
        question: str,
        *,
        history: History | None = None,
        timeout_s: float | None = None,
        sources: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """`stream` for an event loop: `async for piece in context.astream(...)`.

        The loop is never blocked. What `ask` raises comes with the first piece. `contextlib.aclosing` or `async with`
        stops generation when the block is left.
        """
        return AsyncStream(self._engine, lambda: self.request(question, history, timeout_s, options, sources=sources))

    def next_token_logits(self, question: str, *, history: History | None = None) -> Tensor:
        """Logits of the answer's first token, [vocab_size], float32 on the CPU (float64 for a float64 model).

        Raises what `ask` does.
        """
        return self._logits(question, history, ())[0]

    def answer_logits(self, question: str, token_ids: Sequence[int], *, history: History | None = None) -> Tensor:
        """Logits of each token of a given answer, [tokens, vocab_size], float32 on the CPU (float64 for a float64
        model). Row i follows the question and the answer's first i tokens. All are computed in one pass.

        Args:
            question: see `ask`.
            token_ids: the answer's ids, at least one, such as `answer.token_ids`.
            history: see `ask`.

        Raises:
            InputError: `token_ids` can't be used; and all that `ask` raises.
        """
        rows = self._engine.config.vocab_size
        if not token_ids or any(type(each) is not int or not 0 <= each < rows for each in token_ids):
            raise InputError(
                f"token_ids must be at least one id from 0 to {rows - 1}; got {shown(token_ids)}. Pass an answer's "
                "token_ids."
            )
        return self._logits(question, history, tuple(token_ids[:-1]))

    def _logits(self, question: str, history: History | None, forced: tuple[int, ...]) -> Tensor:
        """Logits after the question and after each forced token, [1 + forced tokens, vocab_size]."""
        composition, keys = self._prompt(question, history)
        check_window(
            composition.tokens + len(forced),
            self._engine.config.window,
            "The context with this question and answer",
            "Compose fewer chunks, or shorten the answer.",
        )

        def taken(_: Sequence[Resident], logits: Tensor | None) -> Tensor:
            if logits is None:
                raise RuntimeError("the model gave no logits although they were asked for")
            return logits.cpu().clone()

        logits = cast("Tensor", self._run(composition, keys, taken, forced))
        return logits.clone()  # a plain tensor, free to be changed: the model's own is an inference tensor

    def prepare(self) -> int:
        """Compute now what the first question would have to, and store what the mode keeps. What a mode computes again
        is the first question's, unless it is kept and the same for all ("linked").

        Returns:
            Number of tokens computed.

        Raises:
            PoolFullError: the context does not fit in the KV pool.
            StoreError: what was computed can't be written.
        """
        request = self._request(self._composition, self._keys, lambda *_: None)
        self._engine.run(request)
        return request.computed_tokens + request.repaired_tokens

    def to_transformers_cache(self, config: "PretrainedConfig | None" = None) -> "DynamicCache":
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
            InputError: the mode computes tokens again for each question.
            PoolFullError: the context does not fit in the KV pool.
            StoreError: what was computed can't be written.
        """
        if self._composition.repair:
            raise InputError(
                "mode must be 'exact', 'anchored' or 'isolated' for a cache of transformers, which has no question to "
                f"repair for; got {self.mode!r}. Compose with one of these modes."
            )
        engine, segments = self._engine, self._composition.segments

        def copied(entries: Sequence[Resident], _: Tensor | None) -> "DynamicCache":
            with torch.inference_mode(False), torch.no_grad():  # plain tensors, free to be changed
                return to_dynamic_cache(engine.model, engine.pool, segments, entries, config)

        return cast("DynamicCache", self._run(self._composition, self._keys, copied))

    def explain(self) -> Explanation:
        """What a call would find in memory or store, why it would not find the rest, and how long having all of it
        ready should take. Loads and computes nothing.

        Times are those of the rates measured in this process, or in an earlier one on this store.
        """
        rows = []
        rates = self._engine.rates
        segments = self._composition.segments
        self._engine.check_open()
        places = self._engine.locate(self._keys)
        absent = [key for key, found in zip(self._keys, places, strict=True) if found is None]
        reasons = (miss.detail for miss in self._engine.store.explain(absent))
        sizes = [self._engine.pool.bytes_for(len(segment.token_ids)) for segment in segments]
        for segment, found, kv_bytes in zip(segments, places, sizes, strict=True):
            where: Literal["memory", "store", "nowhere"] = "store" if isinstance(found, Hit) else found or "nowhere"
            seconds: float | None = 0.0
            if isinstance(found, Hit):
                seconds = rates.seconds_for("load", found.nbytes)
            elif found is None:
                seconds = rates.seconds_for("compute", len(segment.token_ids))
            rows.append(
                ExplainedChunk(
                    label=segment.label,
                    chunk_id=segment.chunk_id,
                    position=segment.origin,
                    tokens=len(segment.token_ids),
                    after=tuple(segments[index].label for index in segment.after),
                    hit=where != "nowhere",
                    where=where,
                    reason=next(reasons) if found is None else f"in {where}",
                    kv_bytes=kv_bytes,
                    expected_ms=None if seconds is None else seconds * 1e3,
                )
            )
        return Explanation(self._composition.mode, tuple(rows), (*self._composition.notes, *self._overlay_notes()))

    def _overlay_notes(self) -> list[str]:
        """Where an overlay is that every question takes."""
        composition = self._composition
        if not composition.keeps_overlay or not isinstance(composition.repair, Linked):
            return []
        positions = first_tokens(composition, composition.repair.k)
        keys = [overlay_key(composition, self._keys, positions)] if positions else []
        places = ["store" if isinstance(found, Hit) else found for found in self._engine.locate(keys) if found]
        return [f"what every question takes of these {len(positions):,} tokens is in {place}" for place in places]

    def belongs_to(self, engine: Engine) -> bool:
        """Whether this engine composed it."""
        return self._engine is engine

    def request(
        self,
        question: str,
        history: History | None,
        timeout_s: float | None,
        options: SamplingOptions,
        *,
        sources: bool = False,
    ) -> Request:
        """What `ask` submits; raises what it does of its arguments."""
        submitted = perf_counter()
        composition, keys = self._prompt(question, history)
        params = resolve(options, self._engine.config, composition.tokens)
        timeout = _timeout(timeout_s)
        if not isinstance(sources, bool):
            raise InputError(f"sources must be True or False; got {shown(sources)}.")
        self._engine.check_chunks(composition)
        return Request(
            priority=Priority.QUESTION,
            submitted=submitted,
            deadline=None if timeout is None else submitted + timeout,
            namespace=self._engine.namespace,
            counted=self._engine.counted,
            composition=composition,
            keys=keys,
            params=params,
            sources=sources,
            fidelity=self._engine.certificates.find(composition.mode, composition.chunks, anchor=composition.anchored),
            text=AnswerText(self._engine.layout, params.stop, params.stop_ids) if params.stop else None,
        )

    def _request(
        self, composition: Composition, keys: Sequence[EntryKey], then: Then, forced: tuple[int, ...] = ()
    ) -> Request:
        """Something to do with the resident entries of a composition."""
        self._engine.check_open()
        self._engine.check_chunks(composition)
        return Request(
            priority=Priority.QUESTION,
            submitted=perf_counter(),
            decodes=False,
            namespace=self._engine.namespace,
            counted=self._engine.counted,
            composition=composition,
            keys=tuple(keys),
            then=then,
            forced=forced,
        )

    def _run(
        self, composition: Composition, keys: Sequence[EntryKey], then: Then, forced: tuple[int, ...] = ()
    ) -> object:
        return self._engine.run(self._request(composition, keys, then, forced))

    def _prompt(self, question: str, history: History | None) -> tuple[Composition, tuple[EntryKey, ...]]:
        """This composition with a conversation's past and a question, and the keys of its segments."""
        self._engine.check_open()
        layout = self._engine.layout
        if isinstance(question, str):  # else it is refused by its type below
            check_length(question, self._engine.config.window, "The question", "Shorten it.")
        past = conversation(parse_history(history or (), self._engine.config.window), layout, self._engine.turns)
        composition = self._composition
        for turn in past.turns:
            composition = composition.with_turn(turn)
        composition = composition.with_tail(past.opening + layout.question_ids(question, follows=bool(past.turns)))
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


LONGEST_S = 1e12
"""A `timeout_s` must be below it; nobody waits for 30,000 years."""


def _timeout(timeout_s: float | None) -> float | None:
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, Real) or not 0 < timeout_s < LONGEST_S:
        raise InputError(
            f"timeout_s must be a number of seconds above 0 and below 1e12, or None; got {shown(timeout_s)}."
        )
    return float(timeout_s)
