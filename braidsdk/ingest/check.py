"""Check texts before they are registered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from braidsdk.engine.engine import Engine
from braidsdk.errors import InputError, PoolFullError
from braidsdk.prompt.text import check_length, check_window, normalise
from braidsdk.store import NewChunk, chunk_id
from braidsdk.types import LEVEL_CONTEXT, LEVEL_SYSTEM, Chunk, Skipped


@dataclass(frozen=True)
class Candidate:
    """A text that passed its checks.

    Attributes:
        index: its place among the given texts.
        new: what the store registers.
        chunk: the chunk that it will be.
    """

    index: int
    new: NewChunk
    chunk: Chunk


def text_of(given: object) -> tuple[object, Mapping[str, Any] | None]:
    """The text and the metadata of what a caller registers: a str, or an object of LangChain or LlamaIndex.

    Raises:
        InputError: it is neither.
    """
    if isinstance(given, str):
        return given, None
    node = getattr(given, "node", given)  # LlamaIndex: a node with its score
    for name in ("page_content", "text"):
        if hasattr(node, name):
            return getattr(node, name), getattr(node, "metadata", None) or None
    raise InputError(
        f"The text must be text, or an object with page_content or text; got a {type(given).__name__}. Pass its text."
    )


def check_anchor(anchor: Chunk | None, level: int) -> None:
    """Check that a level exists and goes with the anchor.

    Raises:
        InputError: it does not.
    """
    if type(level) is not int or level not in (LEVEL_SYSTEM, LEVEL_CONTEXT):
        raise InputError(f"level must be 0 (system prompt) or 1 (context); got {level!r}.")
    if anchor and (anchor.level != LEVEL_SYSTEM or level == LEVEL_SYSTEM):
        raise InputError(
            f"anchor must be a level-0 chunk, for a chunk of level 1; got a chunk of level {anchor.level} for one of "
            f"level {level}. Register the anchor with register_system, and system prompts without an anchor."
        )


def check_texts(
    engine: Engine,
    texts: Sequence[object],
    names: Sequence[str | None],
    metadata: Sequence[Mapping[str, Any] | None],
    anchor: Chunk | None,
    level: int,
    *,
    skip: bool,
) -> tuple[list[Candidate], list[Skipped]]:
    """Check texts one by one. With `skip`, a text that can't be registered is left out, and no error is raised.

    Raises:
        InputError, PoolFullError: as `Braid.register`.
    """
    good, skipped = [], []
    for index, (text, name, extra) in enumerate(zip(texts, names, metadata, strict=True)):
        try:
            good.append(_check(engine, index, text, name, extra, anchor, level))
        except (InputError, PoolFullError) as error:
            if not skip:
                raise
            skipped.append(skipped_text(index, name if isinstance(name, str) else None, error))
    return good, skipped


def skipped_text(index: int, name: str | None, error: InputError | PoolFullError) -> Skipped:
    """A text that was left out. The error goes without the frames that it came through, because they hold the texts."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return Skipped(index, name, error)


def _check(
    engine: Engine,
    index: int,
    given: object,
    name: str | None,
    metadata: Mapping[str, Any] | None,
    anchor: Chunk | None,
    level: int,
) -> Candidate:
    text, own = text_of(given)
    remedy = "Split it into chunks and register each."
    if isinstance(text, str):
        check_length(text, engine.config.window, "This text", remedy)
    clean = normalise(text)  # type: ignore[arg-type]  # which checks it
    if name is not None and not isinstance(name, str):
        raise InputError(f"name must be text; got a {type(name).__name__}. Pass a str, or leave it out.")
    ident = chunk_id(engine.namespace, level, clean)
    chunk = Chunk(ident, engine.namespace, level, clean, _encode=engine.layout.chunk_ids)
    try:
        tokens = len(chunk.token_ids) + (len(anchor.token_ids) if anchor else 0)
        check_window(tokens, engine.config.window, "This text", remedy)
        engine.pool.check_fits([tokens])
    except BaseException:
        engine.layout.forget(clean)
        raise
    new = NewChunk(engine.namespace, level, clean, name, own if metadata is None else metadata)
    return Candidate(index, new, chunk)
