"""The layout of prompts, taken from the model's own chat template.

Text never becomes control. Documents and questions are encoded by a copy of the tokenizer that makes no control
tokens, so `<|im_end|>` or `<think>` in a text are plain characters; only the template's own parts hold control tokens.
Pieces are encoded one by one and their ids are joined; ids are never decoded and encoded again. Each piece is
NFC-normalised and stripped. A piece that no control token follows is closed with a newline. So the joined ids are those
that transformers gives for the joined text. What the template puts around texts, a BOS token or a default system prompt
say, is taken over as it is.

Knows nothing about models, caches or chunks.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

from braidsdk.errors import UnsupportedModelError, shown
from braidsdk.prompt.answer_text import Detokenizer
from braidsdk.prompt.lru import Remembering
from braidsdk.prompt.seams import Encode, Ids, closed, fit, ways
from braidsdk.prompt.template import ChatTemplate, LayoutWarning, between
from braidsdk.prompt.text import normalise
from braidsdk.prompt.tokenizer import TextTokenizer
from braidsdk.types import LEVEL_SYSTEM

__all__ = ["LayoutWarning", "Past", "PromptLayout"]

_MARKS = ("SYSTEM-GOES-HERE", "USER-GOES-HERE")
_THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


class _Sample(NamedTuple):
    """Texts that the layout is tried with. Those of one kind begin and end differently in all samples."""

    system: str
    document: str
    question: str
    answer: str
    next: str

    def messages(self, count: int = 2) -> list[dict[str, str]]:
        """A conversation's first messages: the system's, the user's with the document, the assistant's, the user's."""
        texts = (self.system, f"{self.document}\n{self.question}", self.answer, self.next)
        roles = ("system", "user", "assistant", "user")
        return [{"role": role, "content": text} for role, text in zip(roles[:count], texts, strict=False)]


_SAMPLES = (
    _Sample("Answer briefly.", "First fact: 12.\nSecond (fact)", "Which one?", "Oslo.", "Why?"),
    _Sample("12 rules hold: don't guess", "(see) R&D <5", 'Let "x" be so: "x"', "(No)", "And  then"),
    _Sample("[Be kind]", "\u00e9t\u00e9 \u4e2d\u6587\u3002", "42", "7", "3 of 4"),
    _Sample("'Tis so", "- one\n- two!", "(why)", '"Yes"', "(who)"),
)


@dataclass(frozen=True)
class Past:
    """How past turns are laid out.

    Attributes:
        closing: ids between a past question and its answer.
        turn: ids between an answer and the next question.
        answer: how the text of an answer is encoded.
        question: how a question after an answer is encoded.
    """

    closing: Ids
    turn: Ids
    answer: Encode
    question: Encode


class PromptLayout:
    """The tokenizer of one checkpoint and the parts of its chat template.

    Attributes:
        fingerprint: hash of everything here that changes the ids of chunks. What closes the user's turn, and with it
            `thinking`, belongs to the tail of each request: entries do not depend on it.
        vocab_size: number of ids the tokenizer knows, added tokens included.
    """

    def __init__(
        self, folder: Path, *, thinking: bool = False, rows: int | None = None, remembered: Path | None = None
    ) -> None:
        """Read tokenizer and chat template from a checkpoint's folder.

        Args:
            folder: the checkpoint.
            thinking: passed to the chat template as `enable_thinking`.
            rows: rows of the model's embedding; None for as many as there are ids.
            remembered: a file that remembers what tokenizers and templates were found to be; see `remember`.

        Raises:
            ModelNotFoundError: the folder holds no `tokenizer.json`.
            UnsupportedModelError: the tokenizer or the chat template can't be followed, or there is no template, or it
                has no place for a system prompt; or the model has no embedding for an id of a prompt.
        """
        self._tokenizer = TextTokenizer(folder, rows, remembered)
        self.vocab_size = self._tokenizer.vocab_size
        self._template = ChatTemplate(self._tokenizer, thinking=thinking)
        self._ways = ways(self._tokenizer)
        system, user = _MARKS
        asked = {"role": "user", "content": user}
        head, middle, closing = between(self._template.text([{"role": "system", "content": system}, asked]), *_MARKS)
        header, _ = between(self._template.text([asked]), user)
        self.fingerprint = self._tokenizer.fingerprint(head, middle, header)
        self._header: Ids | None
        self._fit_prompt(head, middle, closing, header)
        self._check_words()
        if rows is not None:
            self._check_vocabulary(rows)
        if thinking and "enable_thinking" not in self._template.source:
            self._warn(
                "thinking=True changes nothing: this model's chat template has no enable_thinking. Leave it out. The "
                "template decides whether the model thinks."
            )

    def remember(self) -> None:
        """Keep what was found until now for processes that open this checkpoint later. Call it when nothing was
        refused."""
        if not self._tokenizer.record.is_known:
            with suppress(UnsupportedModelError):  # whoever passes a history is told
                _ = self.past  # else the first question of theirs that has one would wait for it
        self._tokenizer.record.keep()

    @property
    def header_ids(self) -> Ids:
        """The user header, for a prompt without a system block. It holds the template's default system prompt, if
        there is one.

        Raises:
            UnsupportedModelError: texts after it would have other ids than elsewhere.
        """
        if self._header is None:
            raise UnsupportedModelError(
                "The first chunk must be a system prompt with this model: without one, its chat template and tokenizer "
                "give the first document other tokens than elsewhere. Register one with register_system, and compose "
                "it first."
            )
        return self._header

    def chunk_ids(self, level: int, text: str) -> Ids:
        """The ids that a chunk of this level owns, for a normalised text (see `compose`)."""
        if level == LEVEL_SYSTEM:
            return self._system_open + self._encode_system(text) + self._system_close
        return self.plain_ids(text)

    def plain_ids(self, text: str) -> Ids:
        """Ids of a normalised text and a newline, without any control token."""
        return self._encode(text + "\n")

    def forget(self, text: str) -> None:
        """Remember nothing of a normalised text of a chunk."""
        self._encode.forget(text + "\n")

    def apart(self) -> Self:
        """The same layout, which remembers nothing of the texts that this one encoded."""
        other = copy(self)
        other._encode = self._encode.apart()
        return other

    def question_ids(self, question: str, *, follows: bool = False, past: bool = False) -> Ids:
        """Ids of the tail: the question, the end of the user's turn, and the assistant's header.

        Args:
            question: the question.
            follows: whether it follows a past answer, and not the chunks.
            past: whether an answer follows that is known by its text only. Then the header is the one that the template
                gives to past answers, without what it opens for a new one, such as a thought.

        Raises:
            EmptyTextError, InputError: the question can't be used.
            UnsupportedModelError: see `past`.
        """
        clean = normalise(question, "The question")
        ids = self.past.question(clean) if follows else self._encode_question(clean)
        return ids + (self.past.closing if past else self._closing)

    def answer_ids(self, text: str) -> Ids:
        """Ids of a past answer's normalised text as the template shows it, without what closes it.

        The ids that were generated may differ. Many templates leave out thoughts. Where one shows them, the marks of a
        thought at the start are control tokens, as they were when the model thought.

        Raises:
            UnsupportedModelError: the template has another header for this answer.
        """
        return self._answer_as_shown(self._shown(text)) if text else ()

    def thinks_on(self, answer_ids: Sequence[int]) -> bool:
        """Whether an answer ends within a thought, its own or one that the header opens."""
        said = (*self._closing, *answer_ids)
        for marks in _THOUGHTS:
            opening, closing = map(self._tokenizer.control.get, marks)
            if opening in said:
                after = said[len(said) - said[::-1].index(opening) :]
                return closing not in after
        return False

    @property
    def turn_ids(self) -> Ids:
        """Ids between an answer and the next question: the end of the assistant's turn and the user header.

        Raises:
            UnsupportedModelError: see `past`.
        """
        return self.past.turn

    @cached_property
    def past(self) -> Past:
        """How past turns are laid out.

        Raises:
            UnsupportedModelError: the chat template does not show past turns as they are given, or moves what stands
                before them, or joins their texts to other ids.
        """
        wholes = [self._template.ids(sample.messages(4)) for sample in _SAMPLES]
        fixed = self._system_open, self._system_close, self._closing

        def pieces(chosen: Sequence[Encode]) -> list[tuple[Ids, ...]]:
            answer, question = chosen
            return [
                (self._encode_system(s.system), self._user_ids(s), answer(s.answer), question(s.next)) for s in _SAMPLES
            ]

        found = fit(wholes, [self._ways, closed(self._ways, self._turn_texts[3])], pieces)
        if found is not None:
            (answer, question), (opened, middle, closing, turn, end) = found
            if (opened, middle, end) == fixed:
                return Past(closing, turn, answer, question)
        _, closing_text, turn_text, _ = self._turn_texts
        with_control, plain = self._tokenizer.with_control, self._tokenizer.plain
        past = Past(with_control(closing_text), with_control(turn_text), plain, plain)
        ours = [
            self.chunk_ids(LEVEL_SYSTEM, s.system) + self._user_ids(s) + past.closing + plain(s.answer) + past.turn
            + plain(s.next) + self._closing
            for s in _SAMPLES
        ]  # fmt: skip
        self._compare(ours, wholes, "a conversation", "Ask without history")
        return past

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The id with which the template ends an answer. A model that was tuned with this template ends its answers
        with it, though its config may name only the base model's end of text. None if there is no such id."""
        try:
            _, _, turn, _ = self._turn_texts
        except UnsupportedModelError:
            return frozenset()  # whoever passes a history is told
        control = frozenset(self._tokenizer.control.values())
        ids = self._tokenizer.with_control(turn)
        at = next((index for index, token_id in enumerate(ids) if token_id in control), None)
        if at is None or self.decode(ids[:at]).strip():
            self._warn(
                f"The chat template ends an answer with {shown(turn)}, which begins with no control token of this "
                "tokenizer. Answers may not end there: pass stop=[...], or use the tokenizer that the model was tuned "
                "with."
            )
            return frozenset()
        return frozenset({ids[at]})

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        return self._tokenizer.decode(token_ids)

    def detokenizer(self) -> Detokenizer:
        """A detokenizer for one answer. Its pieces joined equal `decode` of all ids."""
        return self._tokenizer.detokenizer()

    def _user_ids(self, sample: _Sample) -> Ids:
        return self.plain_ids(sample.document) + self._encode_question(sample.question)

    def _fit_prompt(self, head: str, middle: str, closing: str, header: str) -> None:
        """Find how texts are encoded and which ids stand around them, so that prompts are the template's.

        Raises:
            UnsupportedModelError: joined ids can't be the template's, and would not even have its text.
        """
        asked = [sample.messages() for sample in _SAMPLES]
        alone = [[m[0], {"role": "user", "content": s.question}] for s, m in zip(_SAMPLES, asked, strict=True)]
        wholes = [self._template.ids(messages) for messages in (*asked, *alone)]

        def pieces(chosen: Sequence[Encode]) -> list[tuple[Ids, ...]]:
            system, user, last = chosen
            long = [(system(s.system), user(f"{s.document}\n") + last(s.question)) for s in _SAMPLES]
            return [*long, *((system(s.system), last(s.question)) for s in _SAMPLES)]

        user_ways = self._ways[:2]
        found = fit(wholes, [closed(self._ways, middle), user_ways, closed(user_ways, closing)], pieces)
        if found is not None:
            (system, user, last), (self._system_open, self._system_close, self._closing) = found
            self._encode_system, self._encode, self._encode_question = system, Remembering(user), last
            self._header = self._fit_header()
            return
        with_control, plain = self._tokenizer.with_control, self._tokenizer.plain
        self._system_open, self._system_close, self._closing = map(with_control, (head, middle, closing))
        self._encode_system, self._encode, self._encode_question = plain, Remembering(plain), plain
        self._header = with_control(header)
        ours = [self.chunk_ids(LEVEL_SYSTEM, s.system) + self._user_ids(s) + self._closing for s in _SAMPLES]
        ours += [self._header + self._user_ids(s) + self._closing for s in _SAMPLES]
        bare = [self._template.ids(messages[1:]) for messages in asked]
        self._compare(ours, wholes[: len(asked)] + bare, "a prompt", "Use another checkpoint")

    def _fit_header(self) -> Ids | None:
        """The ids before the user's text without a system message; None if texts do not join to them."""
        short = [[{"role": "user", "content": sample.question}] for sample in _SAMPLES]
        wholes = [self._template.ids(messages) for messages in (*(s.messages()[1:] for s in _SAMPLES), *short)]
        pieces = [(self._user_ids(s),) for s in _SAMPLES] + [(self._encode_question(s.question),) for s in _SAMPLES]
        found = fit(wholes, [], lambda _: pieces)
        return found[1][0] if found is not None and found[1][1] == self._closing else None

    def _compare(self, ours: Sequence[Ids], theirs: Sequence[Ids], what: str, remedy: str) -> None:
        """Warn if ids differ and their text does not.

        Raises:
            UnsupportedModelError: the text differs, too.
        """
        decode = self._tokenizer.decode
        for our, their in zip(ours, theirs, strict=True):
            got, wanted = decode(our, with_control=True), decode(their, with_control=True)
            if got != wanted:
                start = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), 0)
                raise UnsupportedModelError(
                    f"The texts of {what} must stand in the chat template as they are given, and their tokens must "
                    f"join to those of the whole; got {shown(got[max(start - 20, 0) :], 60)} for "
                    f"{shown(wanted[max(start - 20, 0) :], 60)}. {remedy}."
                )
        if list(ours) != list(theirs):
            self._warn(
                "Composed prompts differ by some tokens from what this model's chat template gives for the same text. "
                "Answers may differ from a plain transformers prompt; check the template's white space."
            )

    def _check_words(self) -> None:
        """Warn of added words that the model does not know, and of those that join with the piece before them."""
        if self._tokenizer.unknown:
            self._warn(
                f"The model has no embedding for {len(self._tokenizer.unknown)} words that were added to its tokenizer,"
                f" such as {shown(self._tokenizer.unknown[0], 40)}. Texts spell them as before they were added. Resize "
                "the model's embeddings and tune it, or use the tokenizer that belongs to it."
            )
        takes = [word for word in self._tokenizer.words if self._joins(word)]
        if takes:
            self._warn(
                f"The tokenizer's added word {shown(takes[0], 40)} takes the newline that stands before it. Documents "
                "that begin with it get other tokens than from a plain transformers prompt."
            )

    def _check_vocabulary(self, rows: int) -> None:
        """Check that the model has an embedding for every id that a prompt may hold. Control tokens that no prompt
        holds, such as a padding token that was added for training, need none.

        Raises:
            UnsupportedModelError: it has not.
        """
        parts: Iterable[Ids] = (self._system_open, self._system_close, self._closing, self._header or ())
        highest = max((self._tokenizer.highest_plain(), *(token_id for part in parts for token_id in part)))
        if highest >= rows:
            raise UnsupportedModelError(
                f"vocab_size must be above every token id of a prompt; got {rows}, and the tokenizer gives ids up to "
                f"{highest} ({shown(self._tokenizer.token(highest), 40)}). Resize the model's embeddings "
                "(resize_token_embeddings(len(tokenizer)) in transformers) and save it again, or use the tokenizer "
                "that belongs to it."
            )

    def _joins(self, word: str) -> bool:
        text = word.strip()
        return bool(text) and self._encode(f"a\n{text} b") != self._encode("a\n") + self._encode(f"{text} b")

    @cached_property
    def _turn_texts(self) -> tuple[str, str, str, str]:
        """What stands before a past question, between it and its answer, before the next question, and after that."""
        user, answer, last = "USER-GOES-HERE", "ANSWER-GOES-HERE", "QUESTION-GOES-HERE"
        past = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        before, closing, turn, after = between(
            self._template.text([*past, {"role": "user", "content": last}]), user, answer, last
        )
        return before, closing, turn, after

    def _shown(self, answer: str) -> str:
        """A past answer's text as the template shows it."""
        user, last = "USER-GOES-HERE", "QUESTION-GOES-HERE"
        messages = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": last},
        ]
        _, closing, turn, _ = self._turn_texts
        text = self._template.text(messages)
        turned = text[text.index(user) + len(user) : text.rindex(last)] if user in text and last in text else ""
        whole = len(turned) >= len(closing) + len(turn)
        if not (whole and turned.startswith(closing) and turned.endswith(turn)):
            raise UnsupportedModelError(
                "The chat template must show past answers after the same header, whatever they hold; this one does not "
                f"for {shown(answer)}. Leave thoughts out of the history's answers."
            )
        return turned[len(closing) : len(turned) - len(turn)]

    def _answer_as_shown(self, text: str) -> Ids:
        for marks in _THOUGHTS:
            opening, closing = map(self._tokenizer.control.get, marks)
            if opening is None or closing is None or marks[1] not in text:
                continue
            thought, _, rest = text.partition(marks[1])
            opened = re.match(re.escape(marks[0]), thought)
            inner = thought[opened.end() :] if opened else thought
            first = self._tokenizer.plain if opened else self.past.answer
            ids = ((opening,) if opened else ()) + (first(inner) if inner else ())
            return (*ids, closing, *(self._tokenizer.plain(rest) if rest else ()))
        return self.past.answer(text) if text else ()

    def _warn(self, message: str) -> None:
        warnings.warn(message, LayoutWarning, stacklevel=4)
