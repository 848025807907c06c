"""Turns texts into the ids of a prompt, the same ids that the SDK composes.

Texts are NFC-normalised, stripped, and encoded one by one by a tokenizer without added tokens. Only this module adds
control ids. The ids equal what the chat template gives for the system text and one user turn, which holds the
documents, each with a newline, and the question.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from braidsdk.models.tiny.tokenizer import without_added_tokens

__all__ = ["Layout", "Prefix"]


@dataclass(frozen=True)
class Prefix:
    """The ids before the question, and where the pieces end.

    `bounds[0]` is the end of the system block (with the user header), `bounds[i]` the end of document i - 1.
    """

    ids: list[int]
    bounds: tuple[int, ...]


def _clean(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


class Layout:
    """Builds prompts for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._plain = without_added_tokens(tokenizer)

        def control(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text).ids
            return ids

        self._system_header = control("<|im_start|>system\n")
        self._system_end = control("<|im_end|>\n<|im_start|>user\n")
        self._user_header = control("<|im_start|>user\n")
        self._question_end = control("<|im_end|>\n<|im_start|>assistant\n")
        self.end = control("<|im_end|>")
        (self.pad,) = control("<|endoftext|>")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text alone. Control tokens in a text are plain characters."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts))]

    def prefix(self, system: str | None, documents: Sequence[str], *, header: bool = True) -> Prefix:
        """The system block, or the bare user header without one, and the documents.

        Without `header` there is neither, and the first document stands at position 0. The SDK makes no such prompt.
        """
        pieces = [f"{_clean(text)}\n" for text in documents]
        if not header:
            ids, encoded = [], self.encode(pieces)
        elif system is None:
            ids, encoded = list(self._user_header), self.encode(pieces)
        else:
            head, *encoded = self.encode([_clean(system), *pieces])
            ids = [*self._system_header, *head, *self._system_end]
        bounds = [len(ids)]
        for piece in encoded:
            ids += piece
            bounds.append(len(ids))
        return Prefix(ids, tuple(bounds))

    def question(self, text: str) -> list[int]:
        """The question, its end, and the assistant header."""
        return self.encode([_clean(text)])[0] + self._question_end

    def turns(self, questions: Sequence[str], answers: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """(question ids, answer ids with the end token) of each pair, in one pass of the tokenizer."""
        encoded = self.encode([_clean(text) for text in (*questions, *answers)])
        half = len(questions)
        return [(encoded[i] + self._question_end, encoded[half + i] + self.end) for i in range(half)]
