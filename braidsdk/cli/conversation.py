"""Answers each line of `braid chat`, or follows it as a command."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from types import FrameType
from typing import TYPE_CHECKING

from braidsdk.cli.exits import report
from braidsdk.cli.output import Output, as_json, counted, one_line
from braidsdk.cli.select import select
from braidsdk.errors import BraidError, InputError, UnknownChunkError, did_you_mean
from braidsdk.types import LEVEL_SYSTEM, milliseconds

if TYPE_CHECKING:
    from braidsdk import Answer, Braid, Chunk
    from braidsdk.answer import Stream
    from braidsdk.engine.sampling import SamplingOptions

HELP = """\
/add NAME...   answer from these chunks too: names, ids or globs such as guide*
/drop NAME...  answer without these chunks
/chunks        list the chunks that answers come from
/explain       show what the next answer would take from the cache
/clear         forget the conversation, keep the chunks
/quit          quit; so does Ctrl-D
To ask a question of several lines, type three quotes on a line before it and after it. Ctrl-C stops an answer."""


class Conversation:
    """Chunks that may change, and the turns so far. Answers go to stdout, and everything else to stderr.

    Attributes:
        ended: whether the user has left it.
        failed: whether a question or a command has failed.
    """

    def __init__(
        self, out: Output, braid: "Braid", chunks: Sequence["Chunk"], mode: str | None, sampling: "SamplingOptions"
    ) -> None:
        """Start a conversation over some chunks.

        Raises:
            WindowExceededError, UnknownModeError: these chunks can't be composed.
        """
        self.ended = self.failed = False
        self._out = out
        self._braid = braid
        self._mode = mode
        self._sampling = sampling
        self._history: list[dict[str, str]] = []
        self._compose(chunks)
        self._commands: dict[str, Callable[[list[str]], None]] = {
            "/add": self._add,
            "/drop": self._drop,
            "/chunks": lambda _: out.say("\n".join(one_line(each.label) for each in self._chunks) or "none"),
            "/explain": lambda _: self._explain(),
            "/clear": lambda _: self._history.clear(),
            "/help": lambda _: out.say(HELP),
            **dict.fromkeys(("/quit", "/exit", "/bye"), lambda _: self._leave()),
        }

    @property
    def described(self) -> str:
        """The chunks, in a few words."""
        labels = [one_line(chunk.label) for chunk in self._chunks]
        if not labels:
            return "no chunks"
        some = ", ".join(labels[:6]) + (", ..." if len(labels) > 6 else "")
        return f"{counted(len(labels), 'chunk')} of {len(self._context.input_ids):,} tokens ({some})"

    def take(self, text: str) -> None:
        """Follow a command, or answer a question. A failure is reported, and the conversation goes on."""
        word, *words = text.split()
        try:
            if not (word.startswith("/") and word[1:].isalpha()):
                self._answer(text)
            elif word in self._commands:
                self._commands[word](words)
            else:
                raise InputError(
                    f"Unknown command {word!r}.{did_you_mean(word, self._commands)} /help lists the commands."
                )
        except BraidError as error:
            self.failed = True
            report(self._out, error)

    def _answer(self, question: str) -> None:
        out, shown = self._out, ""
        with self._context.stream(question, history=self._history, **self._sampling) as stream:
            with _ctrl_c_stops(stream) as stopped:
                for piece in stream:
                    shown += piece
                    if not out.json:
                        out.piece(piece)
            answer = None if stopped() else stream.answer
        self._history += [{"role": "user", "content": question}, {"role": "assistant", "content": shown}]
        if out.json:
            out.json_line({"question": question, **(as_json(answer) if answer else {"text": shown, "stopped": True})})
        else:
            out.piece("\n")
        out.note(_counts(answer) if answer else "  [stopped]")

    def _add(self, words: Sequence[str]) -> None:
        known = {chunk.id for chunk in self._chunks}
        new = [chunk for chunk in select(self._braid.chunks, _needed(words, "/add")) if chunk.id not in known]
        together = [*self._chunks, *new]
        if together and together[0].level != LEVEL_SYSTEM:  # a system prompt only works as one if it stands first
            together.sort(key=lambda chunk: chunk.level)
        self._compose(together)
        self._out.note(f"Answers come from {self.described}.")

    def _drop(self, words: Sequence[str]) -> None:
        gone = {chunk.id for chunk in select(_ChunksHere(self._chunks), _needed(words, "/drop"))}
        self._compose([chunk for chunk in self._chunks if chunk.id not in gone])
        self._out.note(f"Answers come from {self.described}.")

    def _explain(self) -> None:
        self._out.say(str(self._context.explain()))
        if self._history:
            self._out.say(f"  and {counted(len(self._history) // 2, 'turn')} of this conversation after them")

    def _leave(self) -> None:
        self.ended = True

    def _compose(self, chunks: Sequence["Chunk"]) -> None:
        self._context = self._braid.compose(chunks, mode=self._mode)
        self._chunks = list(chunks)


class _ChunksHere:
    """The chunks of a conversation as a `Catalogue`. So a chunk that was deleted from the store can still be
    dropped."""

    def __init__(self, chunks: Sequence["Chunk"]) -> None:
        self._chunks = chunks

    def get(self, name_or_id: str) -> "Chunk":
        for chunk in self._chunks:
            if name_or_id in (chunk.id, chunk.label):
                return chunk
        hint = did_you_mean(name_or_id, [chunk.label for chunk in self._chunks])
        raise UnknownChunkError(f"{name_or_id[:80]!r} is not a chunk of this conversation.{hint} /chunks lists them.")

    def list(self, *, name: str) -> Sequence["Chunk"]:
        return [chunk for chunk in self._chunks if fnmatchcase(chunk.name or "", name)]


@contextmanager
def _ctrl_c_stops(stream: "Stream") -> Iterator[Callable[[], bool]]:
    """Inside the block, Ctrl-C closes the stream, which then ends. A second Ctrl-C interrupts.

    Yields:
        A function that says whether the stream was stopped.
    """
    stopped = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True
        stream.close()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _counts(answer: "Answer") -> str:
    usage, timings = answer.usage, answer.timings
    rate = "" if timings.decode_tokens_per_s is None else f"; {timings.decode_tokens_per_s:,.0f} tokens/s"
    cut = "; stopped at --max-new-tokens" if answer.finish_reason == "length" else ""
    return (
        f"  [{usage.cached_tokens:,} tokens cached, {usage.computed_tokens:,} computed; "
        f"first token {milliseconds(timings.first_token_ms)}{rate}{cut}]"
    )


def _needed(words: Sequence[str], command: str) -> Sequence[str]:
    if not words:
        raise InputError(f"{command} must be followed by names, ids or globs; got none. Example: {command} guide*")
    return words
