"""Text to token ids and back: the prompt's layout, taken from the model's own chat template.

Text never becomes control. Documents and questions are encoded by a copy of the tokenizer that makes no control
tokens, so `<|im_end|>` or `<think>` in a text are plain characters; only the template's own parts hold control tokens.
Pieces are encoded one by one and their ids are joined; ids are never decoded and encoded again. Each piece is
NFC-normalised and stripped. A piece that no control token follows is closed with a newline. So the joined ids are those that the tokenizer
gives for the joined text.

Knows nothing about models, caches or chunks.
"""

import json
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import xxhash
from jinja2 import TemplateError

from braidsdk.errors import UnsupportedModelError
from braidsdk.prompt.answer_text import Detokenizer
from braidsdk.prompt.lru import remembering
from braidsdk.prompt.text import normalise
from braidsdk.prompt.tokenizer import TextTokenizer
from braidsdk.types import LEVEL_SYSTEM

_MARKS = ("SYSTEM-GOES-HERE", "USER-GOES-HERE")


class LayoutWarning(UserWarning):
    """The ids of a composed prompt differ from what the model's chat template gives for the same text."""


class PromptLayout:
    """The tokenizer of one checkpoint and the parts of its chat template.

    Attributes:
        fingerprint: hash of everything here that changes the ids of chunks. What closes the user's turn, and with it
            `thinking`, belongs to the tail of each request: entries do not depend on it.
        header_ids: the user header, for a prompt without a system block.
        vocab_size: number of ids the tokenizer knows, added tokens included.
    """

    def __init__(self, folder: Path, *, thinking: bool = False) -> None:
        """Read tokenizer and chat template from a checkpoint's folder.

        Args:
            folder: the checkpoint.
            thinking: passed to the chat template as `enable_thinking`.

        Raises:
            ModelNotFoundError: the folder holds no `tokenizer.json`.
            UnsupportedModelError: there is no chat template, or it has no place for a system prompt.
        """
        self._tokenizer = TextTokenizer(folder)
        self.vocab_size = self._tokenizer.vocab_size
        self._thinking = thinking
        head, between, closing = self._parts(with_system=True)
        header, _, _ = self._parts(with_system=False)
        self._system_open, self._system_close, self._closing = map(
            self._tokenizer.with_control, (head, between, closing)
        )
        self.header_ids = self._tokenizer.with_control(header)
        self.fingerprint = xxhash.xxh3_128_hexdigest(
            json.dumps([self._tokenizer.written, head, between, header], sort_keys=True).encode()
        )
        self._encode = remembering(self._tokenizer.plain)
        self._check_seams()
        if thinking and "enable_thinking" not in str(self._tokenizer.hf.chat_template):
            warnings.warn(
                "thinking=True changes nothing: this model's chat template has no enable_thinking. Leave it out. The "
                "template decides whether the model thinks.",
                LayoutWarning,
                stacklevel=3,
            )

    def chunk_ids(self, level: int, text: str) -> tuple[int, ...]:
        """The ids that a chunk of this level owns, for a normalised text (see `compose`)."""
        if level == LEVEL_SYSTEM:
            return self._system_open + self._encode(text) + self._system_close
        return self.plain_ids(text)

    def plain_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a normalised text and a newline, without any control token."""
        return self._encode(text + "\n")

    def question_ids(self, question: str) -> tuple[int, ...]:
        """Ids of the tail: the question, the end of the user's turn, and the assistant's header."""
        return self._encode(normalise(question, "The question")) + self._closing

    def answer_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a past answer's normalised text, without what closes it. The ids that were generated may differ."""
        return self._encode(text)

    @cached_property
    def turn_ids(self) -> tuple[int, ...]:
        """Ids between an answer and the next question: the end of the assistant's turn and the user header.

        Raises:
            UnsupportedModelError: the chat template does not show past turns as they are given.
        """
        user, answer, last = "USER-GOES-HERE", "ANSWER-GOES-HERE", "QUESTION-GOES-HERE"
        past = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        text = self._rendered([*past, {"role": "user", "content": last}])
        before, found, after = text.partition(answer)
        between, found_last, _ = after.partition(last)
        if user not in before or not found or not found_last:
            raise UnsupportedModelError(
                "The chat template must show past messages as they are given; this one does not. Ask without history, "
                "or use a checkpoint with Qwen3's template."
            )
        return self._tokenizer.with_control(between)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        return self._tokenizer.decode(token_ids)

    def detokenizer(self) -> Detokenizer:
        """A detokenizer for one answer. Its pieces joined equal `decode` of all ids."""
        return self._tokenizer.detokenizer()

    def _render(self, system: str | None, user: str) -> str:
        messages = [{"role": "user", "content": user}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return self._rendered(messages)

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        try:
            return str(
                self._tokenizer.hf.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, enable_thinking=self._thinking
                )
            )
        except TemplateError as error:
            raise UnsupportedModelError(
                f"The chat template fails on a system and a user message: {str(error)[:200]}. Use the checkpoint's own."
            ) from error

    def _parts(self, *, with_system: bool) -> tuple[str, str, str]:
        """What the template puts before the system text, between it and the user's text, and after that. Without a
        system text, the first part is what stands before the user's text, and the second is empty."""
        system, user = _MARKS
        text = self._render(system if with_system else None, user)
        before, found, after = text.partition(user)
        if not found or (with_system and system not in before):
            raise UnsupportedModelError(
                "The chat template must show the system and the user message as they are given; this one does not. "
                "Use a checkpoint with Qwen3's template."
            )
        if not with_system:
            return before, "", after
        head, _, between = before.partition(system)
        return head, between, after

    def _check_seams(self) -> None:
        system, document, question = "Answer briefly.", "First fact: 12.\nSecond (fact)", "Which one?"
        ours = self.chunk_ids(LEVEL_SYSTEM, system) + self.plain_ids(document) + self.question_ids(question)
        theirs = self._tokenizer.with_control(self._render(system, f"{document}\n{question}"))
        bare = self.header_ids + self.plain_ids(document) + self.question_ids(question)
        if ours != theirs or bare != self._tokenizer.with_control(self._render(None, f"{document}\n{question}")):
            warnings.warn(
                "Composed prompts differ by some tokens from what this model's chat template gives for the same text. "
                "Answers may differ from a plain transformers prompt; check the template's white space.",
                LayoutWarning,
                stacklevel=4,
            )
