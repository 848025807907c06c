"""A checkpoint's tokenizer: text to ids and back, with and without control tokens.

Which added tokens are control: those that the tokenizer calls special, those that look like a mark (`<think>`,
`[INST]`), and those that the chat template holds. The others, words that a fine-tune added or runs of spaces, are part
of texts.

Knows nothing about messages.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from braidsdk.errors import ModelNotFoundError, UnsupportedModelError, shown
from braidsdk.prompt.answer_text import Detokenizer

_MARK = re.compile(r"[<\[{|｟].*[>\]}|｠]", re.DOTALL)
_UNBOUNDED = {"truncation": None, "padding": None}
"""They are settings of a training run or a pipeline, and cut or fill documents. transformers ignores them, too."""


class _Detokenizer:
    """`prompt.answer_text.Detokenizer` of a tokenizer: characters are never split."""

    def __init__(self, tokenizer: Tokenizer, decode: Callable[[Sequence[int]], str]) -> None:
        self._tokenizer, self._decode = tokenizer, decode
        self._stream = DecodeStream(skip_special_tokens=True)
        self._seen: list[int] = []
        self._shown = 0

    def feed(self, token_id: int) -> str:
        self._seen.append(token_id)
        piece = self._stream.step(self._tokenizer, token_id) or ""
        self._shown += len(piece)
        return piece

    def flush(self) -> str:
        return self._decode(self._seen)[self._shown :]


class TextTokenizer:
    """The tokenizer of one checkpoint.

    Attributes:
        hf: the tokenizer of transformers, for its chat template.
        written: what tokenizer.json holds, but for settings that change no ids here.
        control: id of each control token.
        words: the added tokens that are part of texts.
        unknown: the added words that the model has no embedding for. Texts spell them, as before they were added.
        vocab_size: number of ids that it knows, added tokens included.
    """

    def __init__(self, folder: Path, rows: int | None = None) -> None:
        """Read it from a checkpoint.

        Args:
            folder: the checkpoint's folder, or a GGUF file. Beside that, a tokenizer.json counts.
            rows: rows of the model's embedding; None for as many as there are ids.

        Raises:
            ModelNotFoundError: the folder holds no `tokenizer.json`.
            UnsupportedModelError: it can't be read, has no chat template, gives other ids each time, or makes control
                tokens of plain text.
        """
        self.hf, self.written = _read(folder)
        if not self.hf.chat_template:
            raise UnsupportedModelError(
                f"{folder} must hold a chat template; it holds none. Save the tokenizer of an instruct model there."
            )
        spec = json.loads(self.hf.backend_tokenizer.to_str()) | _UNBOUNDED
        if spec["model"].get("dropout"):
            raise UnsupportedModelError(
                f"The tokenizer in {folder} must have no BPE dropout, because the same text would have other ids each "
                f"time; it has dropout {spec['model']['dropout']}. Set dropout to null in tokenizer.json."
            )
        added: list[dict[str, Any]] = spec["added_tokens"]
        template = str(self.hf.chat_template)
        self.control = {each["content"]: int(each["id"]) for each in added if _is_control(each, template)}
        words = {each["content"]: int(each["id"]) for each in added if each["content"] not in self.control}
        self.unknown = tuple(word for word, token_id in words.items() if rows is not None and token_id >= rows)
        self.words = tuple(word for word in words if word not in self.unknown)
        marked = [{**each, "special": each["content"] not in self.words} for each in added]
        self._with_control = Tokenizer.from_str(json.dumps(spec))
        self._plain = Tokenizer.from_str(json.dumps({**spec, "added_tokens": marked}))
        self._plain.encode_special_tokens = True  # as plain text, that is
        self.vocab_size = int(self._with_control.get_vocab_size(with_added_tokens=True))
        special = {each["content"] for each in added if each["special"]}
        spelt = [
            token for token, token_id in self.control.items() if token in special and token_id in self.plain(token)
        ]
        if spelt:
            raise UnsupportedModelError(
                f"The tokenizer in {folder} must make plain tokens of a control token's spelling; it makes "
                f"{shown(spelt[0])} itself of that text. Use a checkpoint whose tokenizer keeps them apart."
            )

    def plain(self, text: str) -> tuple[int, ...]:
        """Ids of a text, in which nothing is control."""
        return tuple(self._plain.encode(text, add_special_tokens=False).ids)

    def with_control(self, text: str) -> tuple[int, ...]:
        """Ids of a template's text, in which the spelling of a control token is that token."""
        return tuple(self._with_control.encode(text, add_special_tokens=False).ids)

    def plain_vocabulary(self) -> dict[str, int]:
        """The tokens that texts may become, and their ids."""
        known: dict[str, int] = self._with_control.get_vocab(with_added_tokens=True)
        return {token: known[token] for token in known.keys() - self.control.keys() - set(self.unknown)}

    def token(self, token_id: int) -> str:
        """An id's token as the vocabulary spells it, for messages."""
        return str(self._with_control.id_to_token(token_id))

    def decode(self, token_ids: Sequence[int], *, with_control: bool = False) -> str:
        """The text of ids. Special tokens are left out, unless `with_control` is on."""
        return str(self._with_control.decode(list(token_ids), skip_special_tokens=not with_control))

    def detokenizer(self) -> Detokenizer:
        """A detokenizer for one answer. Its pieces joined equal `decode` of all ids."""
        return _Detokenizer(self._with_control, self.decode)


def _read(checkpoint: Path) -> tuple[Any, dict[str, Any]]:
    """transformers' tokenizer of a checkpoint, and what its tokenizer.json holds."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    is_file = checkpoint.is_file()
    folder = checkpoint.parent if is_file else checkpoint
    beside = folder / "tokenizer.json"
    if not beside.is_file() and not is_file:
        raise ModelNotFoundError(
            f"{folder} holds no tokenizer.json. Save the tokenizer beside the weights: "
            "tokenizer.save_pretrained(folder)."
        )
    try:
        if beside.is_file():
            found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            written = json.loads(beside.read_text(encoding="utf-8"))
        else:  # transformers makes one of what a GGUF file says; AutoTokenizer would read the whole vocabulary twice
            found = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=checkpoint.name)
            written = json.loads(found.backend_tokenizer.to_str())
    except Exception as error:  # of several libraries: JSON, gguf, tokenizers, transformers
        raise UnsupportedModelError(
            f"The tokenizer in {checkpoint} can't be read: {type(error).__name__}: {str(error)[:200]}. Save it again."
        ) from error
    return found, written | _UNBOUNDED


def _is_control(added: dict[str, Any], template: str) -> bool:
    """Whether an added token is control. Qwen3 does not call `<think>` special, though no text may become it."""
    content = added["content"]
    if added["special"] or _MARK.fullmatch(content.strip()):
        return True
    return content in template and not content.isspace() and not content.isalnum()
