"""The facade: one model, one store, one namespace."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from braidsdk.chunks import Chunks
from braidsdk.compose import check_window, compose
from braidsdk.context import Context, History
from braidsdk.device import parse_device, parse_dtype
from braidsdk.encode import BATCH_TOKENS
from braidsdk.engine import Engine
from braidsdk.errors import InputError
from braidsdk.models.registry import find_checkpoint, load_model
from braidsdk.pool import Pool, default_capacity_bytes
from braidsdk.sampling import SamplingOptions
from braidsdk.settings import store_folder
from braidsdk.store import ChunkStore, Miss, NewChunk
from braidsdk.stream import Stream
from braidsdk.tokens import PromptLayout, is_unicode, normalise
from braidsdk.types import LEVEL_CONTEXT, LEVEL_SYSTEM, Answer, Chunk


class Braid:
    """Register texts once, compose their KV caches in any order, ask.

    A context manager; `close` frees memory and closes the store. Several threads may share one: calls that give a whole
    answer queue, streams take turns with them.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        store: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        namespace: str = "default",
        revision: str | None = None,
        thinking: bool = False,
        pool_bytes: int | None = None,
    ) -> None:
        """Load a model and open a store.

        Args:
            model: "braid-tiny", a folder with a Qwen3 checkpoint (config.json, safetensors, tokenizer), or the id of
                one on the Hugging Face hub, such as "Qwen/Qwen3-0.6B", which is downloaded into the hub's cache.
            store: the store's folder, made if it is not there. None is `BRAID_STORE`, or the user's data folder.
            device: "auto", "cpu", "cuda" or "cuda:N".
            dtype: "float32", "bfloat16", "float64", or "auto": what the checkpoint's config names, or else what its
                weights are stored in; float32 for a float16 checkpoint. Entries of one dtype are misses in another.
            namespace: chunks and entries of one namespace are not seen from another.
            revision: branch, tag or commit of a hub checkpoint; None is its default branch.
            thinking: let the model think before it answers, where its chat template has the choice (Qwen3's own does).
                Stored entries serve both.
            pool_bytes: how much memory resident KV entries may take, besides the model's weights. None is half of what
                is free on the device once the model is loaded.

        Raises:
            InputError: device, dtype, namespace or pool_bytes can't be used.
            ModelError: the checkpoint can't be used.
            StoreError: the store can't be used.
        """
        if not isinstance(namespace, str) or not 1 <= len(namespace) <= 200 or not is_unicode(namespace):
            raise InputError(f"namespace must be text of 1 to 200 characters; got {ascii(namespace)[:80]}.")
        if pool_bytes is not None and (type(pool_bytes) is not int or pool_bytes < 1):
            raise InputError(f"pool_bytes must be a positive whole number of bytes, or None; got {pool_bytes!r}.")
        target, wanted = parse_device(device), parse_dtype(dtype)
        folder = find_checkpoint(model, revision)
        opened = ChunkStore(store_folder(store))
        try:
            loaded = load_model(folder, device=target, dtype=wanted, fingerprints=opened.path / "fingerprints.json")
            pool = Pool.for_model(loaded, pool_bytes or default_capacity_bytes(loaded.device))
            self._engine = Engine(loaded, PromptLayout(folder, thinking=thinking), opened, pool, namespace)
        except BaseException:
            opened.close()
            raise
        self.chunks = Chunks(self._engine)
        self._described = f"Braid({str(model)!r}, {loaded.dtype} on {loaded.device}, store={str(opened.path)!r})"

    def __repr__(self) -> str:
        return self._described

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        self._engine.check_open()
        return self._engine.model.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model is computed in, and its KV entries are kept in."""
        self._engine.check_open()
        return self._engine.model.dtype

    def register(
        self,
        text: str,
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
            text: plain text; control tokens in it are plain characters.
            name: a name to find it by. A second name for the same text is an alias.
            metadata: JSON types; replaces what the chunk has.
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
            StoreError: the store can't be written. What was registered stays so; its entry is computed again later.
        """
        return self._register([text], [name], [metadata], anchor, level, replace, show_progress=False)[0]

    def register_system(
        self, text: str, *, name: str | None = None, metadata: Mapping[str, Any] | None = None, replace: bool = False
    ) -> Chunk:
        """Register a system prompt: `register` at level 0."""
        return self.register(text, name=name, metadata=metadata, level=LEVEL_SYSTEM, replace=replace)

    def register_many(
        self,
        texts: Sequence[str],
        *,
        names: Sequence[str | None] | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        anchor: Chunk | str | None = None,
        level: int = LEVEL_CONTEXT,
        replace: bool = False,
        progress: bool = True,
    ) -> list[Chunk]:
        """Register texts in batches; chunks come back in the order of the texts.

        All texts are checked before anything is written. What is computed is stored batch by batch: an interrupted
        run goes on where it stopped when it is run again.

        Args:
            texts: see `register`.
            names: one per text.
            metadata: one per text.
            anchor, level, replace: see `register`.
            progress: show a progress bar on stderr, where stderr is a terminal.

        Raises:
            InputError: `names` or `metadata` has another length than `texts`; and all that `register` raises.
        """
        if isinstance(texts, str):
            raise InputError("texts must be a list of texts; got a single one. Use register, or put it in a list.")
        texts = list(texts)
        for what, values in (("names", names), ("metadata", metadata)):
            if values is not None and len(values) != len(texts):
                raise InputError(f"{what} must have one item per text: expected {len(texts)}, got {len(values)}.")
        nothing = [None] * len(texts)
        return self._register(texts, names or nothing, metadata or nothing, anchor, level, replace, progress)

    def compose(self, chunks: Sequence[Chunk | str], *, mode: str | None = None, keep: bool | None = None) -> Context:
        """Put chunks one after another, in any order. Runs no model: what is missing is computed by the first question.

        Args:
            chunks: chunks, names or ids.
            mode: "anchored" (default): each chunk as computed after the level-0 chunk that stands first. "isolated":
                each chunk as computed alone. "exact": each chunk as computed after all that precede it here, equal to a
                full prefill.
            keep: whether computed entries go to the store; None keeps all but the chains of "exact".

        Raises:
            UnknownChunkError: a chunk is not in this namespace.
            UnknownModeError: no such mode.
            WindowExceededError: together they exceed the model's window.
        """
        composition = compose(self.chunks.resolve(chunks), layout=self._engine.layout, mode=mode, keep=keep)
        window = self._engine.model.config.window
        check_window(len(composition.input_ids), window, "This composition", "Compose fewer or shorter chunks.")
        return Context(self._engine, composition)

    def ask(
        self,
        question: str,
        *,
        chunks: Sequence[Chunk | str],
        mode: str | None = None,
        keep: bool | None = None,
        history: History | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """`compose` and `Context.ask` in one; takes and raises what they do."""
        return self.compose(chunks, mode=mode, keep=keep).ask(question, history=history, **options)

    def stream(
        self,
        question: str,
        *,
        chunks: Sequence[Chunk | str],
        mode: str | None = None,
        keep: bool | None = None,
        history: History | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """`compose` and `Context.stream` in one; takes and raises what they do."""
        return self.compose(chunks, mode=mode, keep=keep).stream(question, history=history, **options)

    def close(self) -> None:
        """Free memory and close the store. Safe to call twice."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _register(
        self,
        texts: Sequence[str],
        names: Sequence[str | None],
        metadata: Sequence[Mapping[str, Any] | None],
        anchor: Chunk | str | None,
        level: int,
        replace: bool,
        show_progress: bool,
    ) -> list[Chunk]:
        self._engine.check_open()
        if type(level) is not int or level not in (LEVEL_SYSTEM, LEVEL_CONTEXT):
            raise InputError(f"level must be 0 (system prompt) or 1 (context); got {level!r}.")
        before = self.chunks.resolve([anchor])[0] if anchor is not None else None
        if before and (before.level != LEVEL_SYSTEM or level == LEVEL_SYSTEM):
            raise InputError(
                f"A context chunk is anchored to a level-0 chunk; got a chunk of level {level} anchored to one of "
                f"level {before.level}. Register the anchor with register_system, and system prompts without an anchor."
            )
        new = []
        for text, name, extra in zip(texts, names, metadata, strict=True):
            clean = normalise(text)
            tokens = len(self._engine.layout.chunk_ids(level, clean)) + (len(before.token_ids) if before else 0)
            check_window(
                tokens, self._engine.model.config.window, "This text", "Split it into chunks and register each."
            )
            if name is not None and not isinstance(name, str):
                raise InputError(f"name must be text; got a {type(name).__name__}.")
            self._engine.pool.check_fits([tokens])
            new.append(NewChunk(self._engine.namespace, level, clean, name, extra))
        registered = [self.chunks.from_row(row) for row in self._engine.store.add_chunks(new, replace=replace)]
        if before or level == LEVEL_SYSTEM:
            self._compute_missing(before, registered, show_progress)
        return registered

    def _compute_missing(self, anchor: Chunk | None, chunks: Sequence[Chunk], show_progress: bool) -> None:
        """Compute and store what the store lacks of the entries that default compositions of these chunks need."""
        alone = [compose([anchor, chunk] if anchor else [chunk], layout=self._engine.layout) for chunk in chunks]
        keys = [self._engine.keys(composition)[-1] for composition in alone]
        found = self._engine.store.look_up(keys)
        lacking = [chunk for chunk, each in zip(chunks, found, strict=True) if isinstance(each, Miss)]
        with self._engine.working():
            self._engine.disown([key for key, each in zip(keys, found, strict=True) if isinstance(each, Miss)])
        with Progress(
            TextColumn("registering"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not show_progress or not lacking,
            transient=True,
        ) as bar:
            task = bar.add_task("", total=sum(len(chunk.token_ids) for chunk in lacking))
            for group in _groups(lacking, self._engine.pool):
                pieces = [[anchor, *group]] if anchor else [[chunk] for chunk in group]
                for composition in (compose(piece, layout=self._engine.layout) for piece in pieces):
                    keys_now = self._engine.keys(composition)
                    with self._engine.calls, self._engine.working(), self._engine.pool.pinned(keys_now):
                        self._engine.prepare(composition, keys_now)
                bar.advance(task, sum(len(chunk.token_ids) for chunk in group))


def _groups(chunks: Sequence[Chunk], pool: Pool) -> Iterator[list[Chunk]]:
    """Consecutive chunks that fit in one forward pass together, and in a quarter of the pool."""
    room = min(pool.capacity_pages // 4, 2 * pool.pages_for(BATCH_TOKENS))
    group: list[Chunk] = []
    tokens = pages = 0
    for chunk in chunks:
        more = len(chunk.token_ids)
        if group and (tokens + more > BATCH_TOKENS or pages + pool.pages_for(more) > room):
            yield group
            group, tokens, pages = [], 0, 0
        group.append(chunk)
        tokens += more
        pages += pool.pages_for(more)
    if group:
        yield group
