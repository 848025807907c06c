"""A checkpoint's tokenizer: text to ids and back, with and without control tokens.

Which added tokens are control: those that the tokenizer calls special, those that look like a mark (`<think>`,
`[INST]`), and those that the chat template holds. The others, words that a fine-tune added or runs of spaces, are part
of texts.

Knows nothing about messages.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import DecodeStream
from tokenizers.models import Model

from braidsdk.errors import ModelNotFoundError, UnsupportedModelError, shown
from braidsdk.prompt.answer_text import Detokenizer
from braidsdk.prompt.record import Record

_MARK = re.compile(r"[<\[{|｟].*[>\]}|｠]", re.DOTALL)
_UNBOUNDED = {"truncation": None, "padding": None}
"""They are settings of a training run or a pipeline, and cut or fill documents. transformers ignores them, too."""

_OF_ADDED = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


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
        record: what is remembered of it.
        control: id of each control token.
        words: the added tokens that are part of texts.
        unknown: the added words that the model has no embedding for. Texts spell them, as before they were added.
        vocab_size: number of ids that it knows, added tokens included.
    """

    def __init__(self, folder: Path, rows: int | None = None, remembered: Path | None = None) -> None:
        """Read it from a checkpoint.

        Args:
            folder: the checkpoint's folder, or a GGUF file. Beside that, a tokenizer.json counts.
            rows: rows of the model's embedding; None for as many as there are ids.
            remembered: a file that remembers what tokenizers were found to be.

        Raises:
            ModelNotFoundError: the folder holds no `tokenizer.json`.
            UnsupportedModelError: it can't be read, has no chat template, gives other ids each time, or makes control
                tokens of plain text.
        """
        self._checkpoint, self._rows = folder, rows
        self._file = (folder.parent if folder.is_file() else folder) / "tokenizer.json"
        self.record = Record(folder, None if folder.is_file() else remembered)
        parts, template = self.record.once("parts", self._parts)
        if not template:
            raise UnsupportedModelError(
                f"{folder} must hold a chat template; it holds none. Save the tokenizer of an instruct model there."
            )
        spec: dict[str, Any] = parts | _UNBOUNDED
        if spec["model"].get("dropout"):
            raise UnsupportedModelError(
                f"The tokenizer in {folder} must have no BPE dropout, because the same text would have other ids each "
                f"time; it has dropout {spec['model']['dropout']}. Set dropout to null in tokenizer.json."
            )
        added: list[dict[str, Any]] = spec["added_tokens"]
        self.control = {each["content"]: int(each["id"]) for each in added if _is_control(each, template)}
        words = {each["content"]: int(each["id"]) for each in added if each["content"] not in self.control}
        self.unknown = tuple(word for word, token_id in words.items() if rows is not None and token_id >= rows)
        self.words = tuple(word for word in words if word not in self.unknown)
        marked = [{**each, "special": each["content"] not in self.words} for each in added]
        model = self._backend.model
        self._with_control = _built(spec, model)
        self._plain = _built({**spec, "added_tokens": marked}, model)
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

    @cached_property
    def template(self) -> str:
        """Its chat template's source.

        Raises:
            Exception: it holds several, and none is the default.
        """
        return str(self.record.once("template", lambda: self._hf.get_chat_template()))

    def render(
        self, messages: Sequence[Mapping[str, str]], *, template: str, tokenize: bool, opened: bool, thinking: bool
    ) -> Any:
        """What transformers makes of messages: a text, or ids.

        Args:
            messages: with "role" and "content".
            template: the source of a chat template.
            tokenize: whether ids are wanted.
            opened: whether the header of the assistant's answer follows.
            thinking: passed to the template as `enable_thinking`.

        Raises:
            Exception: Jinja's, and whatever an expression of the template raises.
        """
        return self.record.once(
            [list(messages), template, tokenize, opened, thinking],
            lambda: self._hf.apply_chat_template(
                list(messages),
                chat_template=template,
                tokenize=tokenize,
                return_dict=False,
                add_generation_prompt=opened,
                enable_thinking=thinking,
            ),
        )

    def fingerprint(self, *parts: str) -> str:
        """The hash of what tokenizer.json holds, but for settings that change no ids here, and of these parts."""

        def find() -> str:
            return xxhash.xxh3_128_hexdigest(json.dumps([self._written, *parts], sort_keys=True).encode())

        return str(self.record.once(["fingerprint", *parts], find))

    def has_plain(self, form: re.Pattern[str]) -> bool:
        """Whether a token that texts may become holds something of this form."""
        found = self.record.once(
            ["has", form.pattern, self._rows], lambda: any(map(form.search, self._plain_vocabulary()))
        )
        return bool(found)

    def highest_plain(self) -> int:
        """The highest id of the tokens that texts may become."""
        return int(self.record.once(["highest", self._rows], lambda: max(self._plain_vocabulary().values())))

    def _plain_vocabulary(self) -> dict[str, int]:
        known: dict[str, int] = self._with_control.get_vocab(with_added_tokens=True)
        return {token: known[token] for token in known.keys() - self.control.keys() - set(self.unknown)}

    def token(self, token_id: int) -> str:
        """An id's token as the vocabulary spells it, for messages."""
        return str(self._with_control.id_to_token(token_id))

    def _parts(self) -> tuple[dict[str, Any], str]:
        """All of transformers' tokenizer but its vocabulary, as in a tokenizer.json, and its chat templates."""
        spec = json.loads(self._hf.backend_tokenizer.to_str())
        model = spec["model"]
        if self.record.is_kept and json.loads(Tokenizer.from_file(str(self._file)).to_str())["model"] != model:
            self.record.forget()  # transformers changed it
        return {**spec, "model": {"dropout": model.get("dropout")}}, str(self._hf.chat_template or "")

    @cached_property
    def _backend(self) -> Tokenizer:
        """A tokenizer with its vocabulary."""
        if not self.record.is_known:
            backend: Tokenizer = self._hf.backend_tokenizer
            return backend
        try:
            return Tokenizer.from_file(str(self._file))
        except Exception as error:  # the file is not there any more
            raise self._unreadable(error) from error

    @cached_property
    def _written(self) -> dict[str, Any]:
        """What tokenizer.json holds, but for settings that change no ids here."""
        if self._file.is_file():
            written = self._file.read_text(encoding="utf-8")
        else:
            written = self._hf.backend_tokenizer.to_str()
        return dict(json.loads(written)) | _UNBOUNDED

    def _unreadable(self, error: Exception) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"The tokenizer in {self._checkpoint} can't be read: {type(error).__name__}: {str(error)[:200]}. Save it "
            "again."
        )

    @cached_property
    def _hf(self) -> Any:
        """The tokenizer of transformers.

        Raises:
            ModelNotFoundError: there is none.
            UnsupportedModelError: it can't be read.
        """
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        folder = self._file.parent
        if not self._file.is_file() and folder == self._checkpoint:
            raise ModelNotFoundError(
                f"{folder} holds no tokenizer.json. Save the tokenizer beside the weights: "
                "tokenizer.save_pretrained(folder)."
            )
        try:
            if self._file.is_file():
                return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            # transformers makes one of what a GGUF file says; AutoTokenizer would read the whole vocabulary twice
            return PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=self._checkpoint.name)
        except Exception as error:  # of several libraries: JSON, gguf, tokenizers, transformers
            raise self._unreadable(error) from error

    def decode(self, token_ids: Sequence[int], *, with_control: bool = False) -> str:
        """The text of ids. Special tokens are left out, unless `with_control` is on."""
        return str(self._with_control.decode(list(token_ids), skip_special_tokens=not with_control))

    def detokenizer(self) -> Detokenizer:
        """A detokenizer for one answer. Its pieces joined equal `decode` of all ids."""
        return _Detokenizer(self._with_control, self.decode)


def _built(spec: dict[str, Any], model: Model) -> Tokenizer:
    """The tokenizer of what a tokenizer.json holds. Tokenizers share their model: it takes most of the time and the
    memory."""
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    built = Tokenizer.from_str(json.dumps({**spec, "model": empty, "added_tokens": []}))
    built.model = model
    built.add_tokens([AddedToken(**{name: each[name] for name in _OF_ADDED}) for each in spec["added_tokens"]])
    return built


def _is_control(added: dict[str, Any], template: str) -> bool:
    """Whether an added token is control. Qwen3 does not call `<think>` special, though no text may become it."""
    content = added["content"]
    if added["special"] or _MARK.fullmatch(content.strip()):
        return True
    return content in template and not content.isspace() and not content.isalnum()
