"""Makes the byte-level tokenizer of braid-tiny, and writes its files.

It has Qwen3's normalizer, pre-tokenizer and decoder, and a vocabulary of 1,024. Control tokens are added after the BPE
is trained, and have the highest ids. So they are not in the BPE, and without its added tokens the tokenizer cannot
produce one.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from braidsdk.models.tiny.names import make_name
from braidsdk.models.tiny.phrases import (
    ALIASES,
    CLOSINGS,
    OPENINGS,
    RELATIONS,
    SYSTEM_PROMPTS,
    TITLES,
    UNKNOWN_ANSWER,
)

__all__ = ["CHAT_TEMPLATE", "CONTROL_TOKENS", "VOCAB_SIZE", "build_tokenizer", "save_tokenizer", "without_added_tokens"]

VOCAB_SIZE = 1024

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
"""The control tokens in the order of their ids, which are the last five of the vocabulary."""

_WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's and Qwen3's pre-tokenizer."""

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def _corpus(seed: int) -> Iterator[str]:
    """The texts that the merges are learned from: the world's phrases, cut at the names, and the names alone.

    No name stands after a space here, so no merge joins a space to a capital letter, and a name has the same ids
    everywhere. Copying a name is then copying its ids. Phrases that were added later are not used.
    """
    rng = random.Random(seed)
    phrases = [text for relation in RELATIONS for text in (*relation.statements, *relation.questions)]
    phrases += [*ALIASES, *OPENINGS, *CLOSINGS, UNKNOWN_ANSWER, *SYSTEM_PROMPTS]
    phrases += ["system", "user", "assistant", *(f"{title} " for title in TITLES)]
    for phrase in phrases:
        for part in phrase.replace("{y}", "{x}").split("{x}"):
            yield from [part] * 200
    for _ in range(60_000):
        yield make_name(rng, "train", two_words=0.0)


def build_tokenizer(seed: int = 0) -> Tokenizer:
    """Train the BPE on the world's phrases and names, then add the control tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=token.startswith("<|")) for token in CONTROL_TOKENS]
    )
    return tokenizer


def without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer without its added tokens, for text that must never become control."""
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = []
    plain: Tokenizer = Tokenizer.from_str(json.dumps(description))
    return plain


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja for `AutoTokenizer`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 5120,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
