"""The facade: one model, one store, one namespace."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack

import torch

from braidsdk import answer
from braidsdk.answer import AsyncStream, Stream
from braidsdk.cache.pool import Pool, default_capacity_bytes
from braidsdk.chunks import Chunks
from braidsdk.compose.auto import Auto
from braidsdk.compose.modes import compose
from braidsdk.compose.repairs import Repair
from braidsdk.context import Context, History
from braidsdk.engine import verbose
from braidsdk.engine.engine import MAX_QUEUE, Engine
from braidsdk.engine.graphs import left_for_entries
from braidsdk.engine.kernel_choice import choose_backends, parse_kernels
from braidsdk.engine.sampling import SamplingOptions
from braidsdk.engine.scheduler import ROW_SLOTS
from braidsdk.errors import EmptyTextError, InputError, did_you_mean, shown
from braidsdk.fidelity.questions import Question
from braidsdk.fidelity.report import FidelityReport
from braidsdk.fidelity.run import run
from braidsdk.ingest.check import check_anchor, check_texts
from braidsdk.ingest.plan import check_disk, estimate, plan
from braidsdk.ingest.register import compute_missing, store_chunks
from braidsdk.model_kernels import Kernels
from braidsdk.models.base import Model
from braidsdk.models.device import parse_device, parse_dtype, parse_weights
from braidsdk.models.registry import EMBEDDED, find_checkpoint, load_model
from braidsdk.models.tiny.outside import warn_once
from braidsdk.progress import ProgressBar, steps_bar
from braidsdk.prompt.layout import PromptLayout
from braidsdk.prompt.text import check_window, is_unicode, normalise
from braidsdk.settings import index_folder, store_folder
from braidsdk.store import WHOLE, ChunkStore, Limit, counters
from braidsdk.store.threads import Threads
from braidsdk.types import (
    LEVEL_CONTEXT,
    LEVEL_SYSTEM,
    Answer,
    Chunk,
    Composable,
    EntryGroup,
    PageDocument,
    Progress,
    Registered,
    RegistrationEstimate,
    Stats,
    Text,
    TextNode,
)

ON_ERROR = ("raise", "skip")

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Braid:
    """Register texts once, compose their KV caches in any order, ask.

    A context manager; `close` frees memory and closes the store. Any number of threads and tasks may share one: an
    engine in a thread of its own serves their requests together, a token for each of them per step.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        store: str | Path | None = None,
        index: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        weights: str = "auto",
        namespace: str = "default",
        revision: str | None = None,
        thinking: bool = False,
        pool_bytes: int | None = None,
        kernels: str | None = None,
        max_queue: int = MAX_QUEUE,
    ) -> None:
        """Load a model and open a store.

        Args:
            model: "braid-tiny", a folder with a checkpoint (config.json, safetensors, tokenizer) of Qwen3, Qwen2, Llama
                or Mistral, a GGUF file of these, or the id of a checkpoint on the Hugging Face hub, such as
                "Qwen/Qwen3-0.6B", which is downloaded into the hub's cache.
            store: the store's folder, made if it is not there. None is `BRAID_STORE`, or the user's data folder.
            index: a local folder for the store's index, if the store is on a network file system. None is
                `BRAID_INDEX`, or the store's folder.
            device: "auto", "cpu", "cuda" or "cuda:N".
            dtype: "float32", "bfloat16", "float64", or "auto": what the checkpoint's config names, or else what its
                weights are stored in; float32 for a float16 checkpoint. Entries of one dtype are misses in another.
            weights: "auto": in that dtype. "int8": those of products, the LM head among them, in 8-bit integers with a
                scale for each 128 columns; activations and KV cache stay as they are. That halves what a token reads,
                and costs a little accuracy (docs/performance.md). torch's operations convert them in each call, which
                is slow: a warning says so. Entries of one are misses in the other.
            namespace: chunks and entries of one namespace are not seen from another.
            revision: branch, tag or commit of a hub checkpoint; None is its default branch.
            thinking: let the model think before it answers, where its chat template has the choice (Qwen3's own does).
                Stored entries serve both.
            pool_bytes: how much memory resident KV entries may take, besides the model's weights; on a GPU, CUDA graphs
                and their workspace count in it. None is half of what is free on the device once the model is loaded.
            kernels: "auto": Triton's on a CUDA device, C kernels on a CPU, where they can run this model, else
                torch's. "triton", "native", "torch": these, or an error. An operation may differ, as in
                "auto,attention=torch"; see docs/performance.md. None is `BRAID_KERNELS`, or "auto".
            max_queue: requests that may wait for memory or a place; one more is refused with QueueFullError.

        Raises:
            InputError: device, dtype, weights, namespace, pool_bytes, kernels or max_queue can't be used.
            ModelError: the checkpoint can't be used.
            PoolFullError: there is less memory than CUDA graphs take.
            StoreError: the store can't be used.
        """
        _check_namespace(namespace)
        if pool_bytes is not None and (type(pool_bytes) is not int or pool_bytes < 1):
            raise InputError(f"pool_bytes must be a positive whole number of bytes, or None; got {pool_bytes!r}.")
        if type(max_queue) is not int or max_queue < 1:
            raise InputError(f"max_queue must be a whole number of at least 1; got {shown(max_queue)}.")
        target, wanted, wanted_kernels = parse_device(device), parse_dtype(dtype), parse_kernels(kernels)
        int8 = parse_weights(weights)
        folder = find_checkpoint(model, revision)
        verbose.begin()
        started = perf_counter()
        opened = ChunkStore(store_folder(store), index=index or index_folder())
        try:

            def load() -> tuple[Model, Pool]:
                choose = partial(choose_backends, wanted_kernels)
                known = opened.path / "fingerprints.json"
                model = load_model(folder, device=target, dtype=wanted, int8=int8, choose=choose, fingerprints=known)
                budget = pool_bytes or default_capacity_bytes(model.device)
                return model, Pool.for_model(model, left_for_entries(model, budget))

            loaded, pool = _in_a_thread(load)
            layout = PromptLayout(
                folder, thinking=thinking, rows=loaded.config.vocab_size, remembered=opened.path / "layouts.json"
            )
            loaded.config = replace(loaded.config, eos_ids=loaded.config.eos_ids | layout.end_ids)
            layout.remember()
            engine = Engine(loaded, layout, opened, pool, namespace, max_queue=max_queue)
        except BaseException:
            opened.close()
            raise
        self._adopt(engine, f"{model} (int8)" if int8 else str(model), folder == EMBEDDED["braid-tiny"])
        self._name_model(self._model)
        _log.info("opened a model of %d layers in %.1f ms", loaded.config.layers, (perf_counter() - started) * 1e3)

    def in_namespace(self, namespace: str, *, counted: bool = True) -> "Braid":
        """A Braid of another namespace with the same model, memory and store, served by the same engine: an application
        with many tenants loads the model once.

        Neither sees chunks, entries, counts or certificates of the other. Closing one closes all of them.

        Args:
            namespace: see `Braid`.
            counted: whether its hits and misses are counted, and remembered when the Braid is closed. Leave it off for
                a namespace that a single request has, so that a million of them leave nothing.

        Raises:
            InputError: it is no text of 1 to 200 characters.
            ClosedError: this Braid is closed.
        """
        _check_namespace(namespace)
        self._engine.check_open()
        other = Braid.__new__(Braid)
        other._adopt(self._engine.in_namespace(namespace, counted=counted), self._model, self._is_tiny)
        return other

    def _adopt(self, engine: Engine, model: str, is_tiny: bool) -> None:
        """Be the facade of an engine.

        Args:
            engine: model, pool and store.
            model: what people call the model.
            is_tiny: whether it is braid-tiny, which knows no texts but those of its world.
        """
        self._engine, self._model = engine, model
        self.chunks = Chunks(engine)
        self.kernels = Kernels(engine)
        self._is_tiny = is_tiny
        self._described = f"Braid({model!r}, {engine.dtype} on {engine.device}, store={str(engine.store.path)!r})"

    def _name_model(self, model: str) -> None:
        """Remember what this model is called, for statistics."""
        key = f"model:{self._engine.identity.weights}"
        if self._engine.store.recall([key]).get(key) != model:
            self._engine.store.remember({key: model})

    def __repr__(self) -> str:
        return self._described

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        self._engine.check_open()
        return self._engine.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model is computed in, and its KV entries are kept in."""
        self._engine.check_open()
        return self._engine.dtype

    @property
    def window(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        self._engine.check_open()
        return self._engine.config.window

    @property
    def opens_thought(self) -> bool:
        """Whether the chat template opens a thought before each answer, so that answers begin within one."""
        self._engine.check_open()
        return self._engine.layout.thinks_on(())

    def register(
        self,
        text: Text,
        *,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        anchor: Chunk | str | None = None,
        level: int = LEVEL_CONTEXT,
        replace: bool = False,
    ) -> Chunk:
        """Register a text, and compute its KV entry if the store lacks it.

        The same text again is the same chunk and computes nothing. Without an anchor only a system prompt is computed
        now: which entry a document needs depends on the system prompt it will stand after, so it waits for the first
        question.

        Args:
            text: plain text; control tokens in it are plain characters. Or an object as a retriever gives it, with
                `page_content` (LangChain) or `text` (LlamaIndex), and perhaps `metadata`.
            name: a name to find it by. A second name for the same text is an alias.
            metadata: JSON types; replaces what the chunk has, and stands for what the object has.
            anchor: the level-0 chunk that it will stand after.
            level: 0 for a system prompt, 1 for context.
            replace: let `name` move here from another text; the old chunk keeps its id.

        Raises:
            EmptyTextError: nothing but white space.
            WindowExceededError: longer than the model's window.
            NameTakenError: `name` stands for another text and `replace` is off.
            UnknownChunkError: no such anchor.
            InputError: anchor, level, name or metadata can't be used.
            PoolFullError: text and anchor take more KV memory than `pool_bytes`.
            StoreFullError: the disk has no room for its entry. Nothing is registered.
            StoreError: the store can't be written. What was registered stays so; its entry is computed again later.
            QueueFullError: more requests wait than `max_queue` allows; as with StoreError.
        """
        return self._register([text], [name], [metadata], anchor, level, replace)[0]

    def register_system(
        self, text: Text, *, name: str | None = None, metadata: Mapping[str, Any] | None = None, replace: bool = False
    ) -> Chunk:
        """Register a system prompt: `register` at level 0."""
        return self.register(text, name=name, metadata=metadata, level=LEVEL_SYSTEM, replace=replace)

    def register_many(
        self,
        texts: Sequence[Text],
        *,
        names: Sequence[str | None] | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        anchor: Chunk | str | None = None,
        level: int = LEVEL_CONTEXT,
        replace: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
        on_progress: Callable[[Progress], None] | None = None,
        progress: bool = True,
    ) -> Registered:
        """Register texts in batches; chunks come back in the order of the texts.

        All texts are checked, and the room on the disk, before anything is written. What is computed is stored batch by
        batch: an interrupted run, also by Ctrl-C, goes on where it stopped when it is run again.

        Args:
            texts: see `register`.
            names: one per text.
            metadata: one per text; None leaves what its object has.
            anchor: see `register`.
            level: see `register`.
            replace: see `register`.
            on_error: "skip" leaves out texts that can't be registered (empty, too long, no text, a name that is taken,
                metadata that is no JSON) and says so in `skipped` of what is returned; "raise" then registers none.
            on_progress: called before the first batch and after each, in this thread. What it raises ends the run.
            progress: show a progress bar on stderr, where stderr is a terminal.

        Raises:
            InputError: `names` or `metadata` has another length than `texts`; and all that `register` raises.
        """
        if on_error not in ON_ERROR:
            raise InputError(
                f"on_error must be 'raise' or 'skip'; got {shown(on_error)}.{did_you_mean(on_error, ON_ERROR)}"
            )
        texts, names, metadata = _listed(texts, names, metadata)
        with ProgressBar() if progress else nullcontext() as bar:

            def report(now: Progress) -> None:
                for listener in (bar, on_progress):
                    if listener:
                        listener(now)

            return self._register(texts, names, metadata, anchor, level, replace, on_error == "skip", report)

    def estimate(
        self, texts: Sequence[Text], *, anchor: Chunk | str | None = None, level: int = LEVEL_CONTEXT
    ) -> RegistrationEstimate:
        """What `register_many` would take for these texts: tokens, bytes, time. Writes nothing.

        Texts that can't be registered are left out. The time is that of the rate which this model had on this device,
        in this process or an earlier one on this store. Where none is known and it matters (4,096 tokens or more),
        some 500 tokens are computed to measure it.

        Args:
            texts: see `register_many`.
            anchor: see `register_many`.
            level: see `register_many`.

        Raises:
            InputError: anchor or level can't be used. UnknownChunkError: no such anchor.
        """
        before = self._anchor(anchor, level)
        texts, names, metadata = _listed(texts, None, None)
        good, _ = check_texts(self._engine, texts, names, metadata, before, level, skip=True)
        return estimate(self._engine, good, plan(self._engine, good, before, level))

    def stats(self) -> Stats:
        """What the store holds of this namespace and how it served so far; `str()` of it is for people."""
        self._engine.check_open()
        engine = self._engine
        held = engine.store.stats(engine.namespace)
        models = [f"model:{group.weights}" for group in held.groups]
        hits, misses = counters(engine.namespace)
        known = engine.store.recall({hits, misses, *models})
        groups = [
            EntryGroup(known.get(key, group.weights[:12]), group.dtype, group.level, group.entries, group.bytes)
            for key, group in zip(models, held.groups, strict=True)
        ]
        pool, load = engine.pool, engine.load()
        return Stats(
            chunks=held.chunks,
            entries=held.entries,
            bytes=held.bytes,
            damaged=held.damaged,
            groups=tuple(sorted(groups, key=lambda group: (group.model, group.dtype, group.level))),
            hits=engine.hits,
            misses=engine.misses,
            all_hits=int(known.get(hits, 0)) + engine.hits,
            all_misses=int(known.get(misses, 0)) + engine.misses,
            pool_used_bytes=pool.used_bytes,
            pool_capacity_bytes=pool.capacity_pages * pool.page_bytes,
            running=load.running,
            waiting=load.waiting,
            steps=load.steps,
            step_tokens=load.step_tokens,
            last_step_rows=load.last_step_rows,
        )

    def limit_store(
        self, *, max_bytes: float | None = None, max_age_days: float | None = None, whole_store: bool = False
    ) -> None:
        """Limit what this namespace's KV entries take on disk, for all processes from now on.

        What is over the limit is evicted at once, and after each registration: entries with the fewest recent uses per
        byte first, never those of pinned chunks (`chunks.update(chunk, pinned=True)`). Texts stay; an evicted entry is
        computed again when a question needs it. `braid gc` collects by hand.

        Args:
            max_bytes: the most bytes that the entries' files may take. None means any number.
            max_age_days: entries that were not used for so many days are evicted, once a day. None means never.
            whole_store: limits the store of all namespaces together instead.

        Raises:
            InputError: a limit is not a number of at least 0.
            StoreReadOnlyError: the store can only be read.
        """
        self._engine.check_open()
        max_age_s = None if max_age_days is None else Limit(max_age_s=max_age_days).max_age_s
        limit = Limit(max_bytes, None if max_age_s is None else 86_400 * max_age_s)
        self._engine.store.set_limit(limit, WHOLE if whole_store else self._engine.namespace)

    def compose(
        self,
        chunks: Sequence[Composable],
        *,
        mode: str | Repair | Auto | None = None,
        keep: bool | None = None,
    ) -> Context:
        """Put chunks one after another, in any order. Runs no model: what is missing is computed by the first question.

        Args:
            chunks: chunks, names or ids; `Inline` texts, which need not be registered; or objects as a retriever gives
                them, whose texts are registered as context.
            mode: "anchored": each chunk as computed after the level-0 chunk that stands first. "isolated": each chunk
                as computed alone. "exact": each chunk as computed after all that precede it here, equal to a full
                prefill. "guided(0.15)+shift", "linked(16)", "blended(0.2)": as "anchored", with some tokens computed
                again for each request; see `braidsdk.compose.repairs`. "auto(min_agreement=0.98)": the cheapest mode
                that `fidelity` measured to agree so often with full prefill, for this model, namespace and number of
                chunks; "anchored" if nothing was measured. None is "auto". Objects such as `Guided(0.15)` are taken
                too.
            keep: whether computed entries go to the store; None keeps all but the chains of "exact". With True, what a
                mode computes again is kept as well, for the same tokens of the same chunks in the same order; else it
                is thrown away with its request.

        Raises:
            UnknownChunkError: a chunk is not in this namespace.
            UnknownModeError: no such mode.
            InputError: an argument of the mode is missing, unknown or out of range; or `keep` is True and an `Inline`
                text is not registered.
            WindowExceededError: together they exceed the model's window.
        """
        composition = compose(
            self.chunks.resolve(chunks, inline=True),
            layout=self._engine.layout,
            mode=Auto.name if mode is None else mode,
            keep=keep,
            certificates=self._engine.certificates.all(),
            calibrated=self._engine.certificates.calibration(),
        )
        window = self._engine.config.window
        check_window(composition.tokens, window, "This composition", "Compose fewer or shorter chunks.")
        return Context(self._engine, composition)

    def ask(
        self,
        question: str,
        *,
        chunks: Sequence[Composable],
        mode: str | Repair | Auto | None = None,
        keep: bool | None = None,
        history: History | None = None,
        timeout_s: float | None = None,
        sources: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """`compose` and `Context.ask` in one; takes and raises what they do."""
        return self.compose(chunks, mode=mode, keep=keep).ask(
            question, history=history, timeout_s=timeout_s, sources=sources, **options
        )

    def ask_many(
        self,
        requests: Sequence[tuple[Context, str]],
        *,
        timeout_s: float | None = None,
        sources: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[Answer]:
        """Answer questions together, each over a context of its own: `[(context, question), ...]`.

        The same as asking each in a thread of its own. Every step computes the next token of all of them. What several
        contexts share lies in memory once, and on a GPU is read once for all. Answers may differ from those of single
        calls where two tokens are equally likely but for rounding.

        Args:
            requests: contexts that this Braid composed, and questions.
            timeout_s: see `Context.ask`; for each of them, from this call on.
            sources: see `Context.ask`.
            **options: see `Context.ask`; for all of them.

        Returns:
            An answer per request, in their order.

        Raises:
            InputError: `requests` or an option can't be used; and all that `Context.ask` raises. One request that fails
                ends them all.
        """
        self._engine.check_open()
        for request in requests:
            if not isinstance(request, tuple | list) or len(request) != 2 or not isinstance(request[0], Context):
                raise InputError("ask_many takes pairs of a context and a question, [(context, 'What is ...?'), ...].")
            if not request[0].belongs_to(self._engine):
                raise InputError("ask_many takes contexts of this Braid; one was composed by another.")
        made = [context.request(question, None, timeout_s, options, sources=sources) for context, question in requests]
        return answer.ask_many(self._engine, made)

    def stream(
        self,
        question: str,
        *,
        chunks: Sequence[Composable],
        mode: str | Repair | Auto | None = None,
        keep: bool | None = None,
        history: History | None = None,
        timeout_s: float | None = None,
        sources: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """`compose` and `Context.stream` in one; takes and raises what they do."""
        return self.compose(chunks, mode=mode, keep=keep).stream(
            question, history=history, timeout_s=timeout_s, sources=sources, **options
        )

    def fidelity(
        self,
        chunks: Sequence[Chunk | str | PageDocument | TextNode],
        questions: Sequence[str | Mapping[str, Any] | Question],
        modes: Sequence[str | Repair] | None = None,
        references: Sequence[str | Sequence[str] | None] | None = None,
        *,
        sample: int | None = None,
        seed: int = 0,
        max_new_tokens: int = 64,
        not_found: Sequence[str] | None = None,
        calibrate: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
        progress: bool = True,
    ) -> FidelityReport:
        """Measure how close modes come to full prefill, on your own chunks and questions.

        Each question is answered greedily in full prefill (mode "exact") and in each mode, and the distributions of the
        next token are compared along full prefill's answer. docs/quality.md says what each figure means. A certificate
        for each mode goes to the store: from then on answers carry it as `answer.fidelity`.

        Outcomes are kept in the store's folder, question by question: an interrupted run, also by Ctrl-C, goes on where
        it stopped when it is run again, and a larger sample or one mode more measures only what is new.

        Args:
            chunks: what the questions are asked over, in this order; a system prompt stands first.
            questions: texts; or mappings with "question", and perhaps "answers" (references), "chunks" (names or ids)
                or "passages" (texts) that stand instead of the context among `chunks`. Passages are registered while
                their question is measured, and their entries are not stored.
            modes: what `compose` takes, but "auto", which chooses among them. Full prefill is always measured. None is
                "anchored".
            references: for each question a text, several of which any is right, or None. They stand for "answers".
            sample: ask so many of the questions, drawn by `seed`. None asks all.
            seed: of the sample, and of the draws that the intervals are made of.
            max_new_tokens: the most tokens of an answer.
            not_found: phrases by which an answer says that it is not in the documents, in place of
                `braidsdk.fidelity.scores.NOT_FOUND`.
            calibrate: first find how `guided` chooses best in this model, and keep it for it: whether tokens near an
                attended one count too, and the layers whose attention it looks at. It takes 30 questions at most,
                of those that the sample leaves where there are so many, and repairs each of them once for every layer
                of the model, and twice more.
            on_progress: called with the questions done and those to be done, in this thread. What it raises ends it.
            progress: show a progress bar on stderr, where stderr is a terminal.

        Raises:
            InputError: there are no questions, or an argument can't be used.
            UnknownModeError: there is no such mode.
            UnknownChunkError: a chunk is not in this namespace.
            BraidError: what `ask` raises.
        """
        selected = self.chunks.resolve(chunks)
        with steps_bar("measuring") if progress else nullcontext() as bar:

            def report(done: int, total: int) -> None:
                for listener in (bar, on_progress):
                    if listener:
                        listener(done, total)

            return run(
                self._engine,
                self.chunks,
                compose=self.compose,
                register=partial(self.register_many, progress=False),
                selected=selected,
                questions=questions,
                modes=modes,
                references=references,
                sample=sample,
                seed=seed,
                max_new_tokens=max_new_tokens,
                not_found=not_found,
                calibrate=calibrate,
                on_progress=report,
            )

    def warm_up(
        self,
        *,
        requests: int = 1,
        on_progress: Callable[[int, int], None] | None = None,
        progress: bool = True,
    ) -> None:
        """Compile kernels and capture CUDA graphs now, so that no question has to wait for it.

        Without it the first question of each length does it. What is compiled stays in Triton's cache on the disk: the
        next process takes seconds. Does nothing on a CPU, or where the model does not run on Triton's kernels alone.

        Args:
            requests: how many will run at once, up to 64.
            on_progress: called with the steps done and those to be done, in this thread. What it raises ends it.
            progress: show a progress bar on stderr, where stderr is a terminal.

        Raises:
            InputError: `requests` can't be used.
            PoolFullError: running calls leave no room for it.
        """
        if type(requests) is not int or not 1 <= requests <= ROW_SLOTS:
            raise InputError(f"requests must be a whole number from 1 to {ROW_SLOTS}; got {shown(requests)}.")
        with steps_bar("warming up") if progress else nullcontext() as bar:

            def report(done: int, total: int) -> None:
                for listener in (bar, on_progress):
                    if listener:
                        listener(done, total)

            work = self._engine.warm_up(requests)
            for done, step in enumerate(work):
                report(done, len(work))
                self._engine.call(step)
            if work:
                report(len(work), len(work))

    def count_tokens(self, text: str) -> int:
        """How many tokens a text takes as a context chunk, the newline that closes it included. White space alone is no
        chunk and takes none.

        Raises:
            InputError: it is no text that can be registered.
        """
        try:
            return len(self.tokenize(text))
        except EmptyTextError:
            return 0

    def tokenize(self, text: str) -> tuple[int, ...]:
        """The token ids of a text as a context chunk, with the newline that closes it. Control tokens in it are plain
        characters.

        Raises:
            EmptyTextError: nothing but white space.
            InputError: it is no text that can be registered.
        """
        self._engine.check_open()
        return self._engine.layout.plain_ids(normalise(text))

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without control tokens.

        Raises:
            InputError: they are no ids of this model.
        """
        self._engine.check_open()
        rows = self._engine.config.vocab_size
        if isinstance(token_ids, str) or any(type(each) is not int or not 0 <= each < rows for each in token_ids):
            raise InputError(f"token_ids must be ids from 0 to {rows - 1}; got {shown(token_ids)}.")
        return self._engine.layout.decode(tuple(token_ids))

    async def aask(
        self,
        question: str,
        *,
        chunks: Sequence[Composable],
        mode: str | Repair | Auto | None = None,
        keep: bool | None = None,
        history: History | None = None,
        timeout_s: float | None = None,
        sources: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """`compose` and `Context.aask` in one; takes and raises what they do. Composes in a thread too."""
        context = await self._engine.beside_the_loop(partial(self.compose, chunks, mode=mode, keep=keep))
        return await context.aask(question, history=history, timeout_s=timeout_s, sources=sources, **options)

    def astream(
        self,
        question: str,
        *,
        chunks: Sequence[Composable],
        mode: str | Repair | Auto | None = None,
        keep: bool | None = None,
        history: History | None = None,
        timeout_s: float | None = None,
        sources: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """`compose` and `Context.astream` in one; takes what they do, and raises it with the first piece."""
        return AsyncStream(
            self._engine,
            lambda: self.compose(chunks, mode=mode, keep=keep).request(
                question, history, timeout_s, options, sources=sources
            ),
        )

    def close(self) -> None:
        """Free memory and close the store. Safe to call twice."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _anchor(self, anchor: Chunk | str | None, level: int) -> Chunk | None:
        self._engine.check_open()
        found = self.chunks.resolve([anchor])[0] if anchor is not None else None
        check_anchor(found, level)
        return found

    def _register(
        self,
        texts: Sequence[Text],
        names: Sequence[str | None],
        metadata: Sequence[Mapping[str, Any] | None],
        anchor: Chunk | str | None,
        level: int,
        replace: bool,
        skip: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Registered:
        engine, before = self._engine, self._anchor(anchor, level)
        good, skipped = check_texts(engine, texts, names, metadata, before, level, skip=skip)
        if self._is_tiny and level == LEVEL_CONTEXT:
            warn_once(each.new.text for each in good)
        planned = plan(engine, good, before, level)
        if planned.missing:
            expected = estimate(engine, good, planned)
            _log.info("registering %s", expected)
            check_disk(engine, expected)
        rows, refused = store_chunks(engine, good, replace_names=replace, skip=skip)
        skipped = sorted((*skipped, *refused), key=lambda each: each.index)
        for each in skipped:
            _log.warning("skipped text %d: %s", each.index, type(each.error).__name__)
        registered = Registered([self.chunks.from_row(row) for row in rows], skipped)
        compute_missing(engine, planned, registered, on_progress)
        return registered


def _check_namespace(namespace: object) -> None:
    if not isinstance(namespace, str) or not 1 <= len(namespace) <= 200 or not is_unicode(namespace):
        raise InputError(f"namespace must be text of 1 to 200 characters; got {shown(namespace)}.")


def _in_a_thread(work: Callable[[], T]) -> T:
    """Compute something by torch in a thread that ends with it. After Ctrl-C it goes on, and the interpreter's exit
    waits for it.

    On a CPU the OpenMP threads that torch starts belong to the thread that computes. While those of a second one exist
    the engine's sleep between operations, which costs a fifth of its speed.
    """
    threads = Threads(1, "braid-load")
    try:
        return threads.submit(work).result()
    finally:
        threads.shutdown(wait=False)


def _listed(
    texts: Sequence[Text],
    names: Sequence[str | None] | None,
    metadata: Sequence[Mapping[str, Any] | None] | None,
) -> tuple[Sequence[Text], Sequence[str | None], Sequence[Mapping[str, Any] | None]]:
    """Lists of one length.

    Raises:
        InputError: they are not.
    """
    if isinstance(texts, str):
        raise InputError("texts must be a list of texts; got a single one. Use register, or put it in a list.")
    texts = list(texts)
    for what, values in (("names", names), ("metadata", metadata)):
        if values is not None and len(values) != len(texts):
            raise InputError(
                f"{what} must have one item per text: expected {len(texts)}, got {len(values)}. Put None for no item."
            )
    return texts, names or [None] * len(texts), metadata or [None] * len(texts)
