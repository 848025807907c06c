"""Fakes for the tests of applications: a Braid whose model answers at once, without a checkpoint.

    from braidsdk.testing import FakeBraid

    def test_the_bot_answers() -> None:
        with FakeBraid({"What is the refund period?": "30 days."}) as braid:
            rules = braid.register_system("Answer from the documents.")
            terms = braid.register("Refunds are made within 30 days.", anchor=rules)
            assert braid.ask("What is the refund period?", chunks=[rules, terms]).text == "30 days."

Only the model and the tokenizer are fake. Registering, names, composition, paged memory, the store, usage, streams and
errors are real. A token is a byte of UTF-8. The fake keeps token ids in its KV memory and reads the prompt back from
there, so it only answers what was really composed. The store is a temporary folder that `close` removes.

Answers are the same in every run. Nothing is downloaded.
"""

import os
import shutil
import tempfile
import weakref
from codecs import getincrementaldecoder
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from braidsdk.braid import Braid
from braidsdk.cache.pool import Pool
from braidsdk.engine.engine import MAX_QUEUE, Engine
from braidsdk.errors import InputError, did_you_mean, shown
from braidsdk.kernels.backends import Backends
from braidsdk.kernels.paging import PagedSegment, append
from braidsdk.kernels.rope import RotaryTable
from braidsdk.models.base import Batch, Model, ModelConfig
from braidsdk.prompt.answer_text import Detokenizer
from braidsdk.prompt.layout import Past, PromptLayout
from braidsdk.prompt.lru import Remembering
from braidsdk.store import ChunkStore

__all__ = ["ANSWER", "Answers", "FakeBraid", "FakeModel"]

Answers = Mapping[str, str] | Callable[[str, tuple[str, ...]], str]
"""Questions and their answers, or a function that gets the question and the texts of the composed chunks. The texts are
in order, with the system prompt's first."""

ANSWER = "A fake answer."

_SYSTEM, _USER, _CLOSE, _ASSISTANT, _END = range(256, 261)
_VOCABULARY = 261
_WINDOW = 100_000
_POOL_BYTES = 64 * 2**20


class FakeModel:
    """A model of one layer that computes nothing. It keeps ids as keys, and looks up its answers.

    It takes the place of a `Model`. Use it through `FakeBraid`.
    """

    def __init__(self, answers: Answers, *, window: int = _WINDOW) -> None:
        """Prepare the answers.

        Args:
            answers: what it answers.
            window: how many tokens, that is bytes, a prompt and its answer may have.
        """
        self.config = ModelConfig(
            layers=1,
            q_heads=1,
            kv_heads=1,
            head_dim=2,
            vocab_size=_VOCABULARY,
            hidden_size=1,
            intermediate_size=1,
            window=window,
            rope='{"rope_type":"none"}',
            eos_ids=frozenset({_END}),
        )
        self.fingerprint = "fake"
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.backends = Backends()
        self.geometry = self.config.geometry(self.dtype)
        self.rotary = RotaryTable(torch.zeros(1), 1.0, torch.float32, self.device)
        self._answers = answers
        self._given: dict[tuple[str, tuple[str, ...]], str] = {}

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: Tensor, logit_rows: Tensor | None) -> Tensor | None:
        """Keep the ids, and give the next token of the answer all the weight. See `models.base.Model.forward`."""
        keys = batch.token_ids.to(kv.dtype)[:, None, None].expand(-1, 1, kv.shape[-1])
        append(kv[0], batch.slots, keys, keys)
        if logit_rows is None:
            return None
        logits = torch.zeros(len(logit_rows), _VOCABULARY)
        for place, row in enumerate(logit_rows.tolist()):
            request = next(each for each in batch.requests if each.rows.start <= row < each.rows.stop)
            *context, tail = (_ids(kv[0], segment) for segment in request.segments)
            logits[place, self._next(context, tail[: len(tail) - (request.rows.stop - 1 - row)])] = 1e4
        return logits

    @torch.inference_mode()
    def attention_shares(self, batch: Batch, kv: Tensor, layers: range) -> Tensor:  # noqa: ARG002 - it has no weights
        """Every token that a row sees has the same weight. See `models.base.Model.attention_shares`."""
        most = max(len(request.segments) for request in batch.requests)
        seen = torch.zeros(len(batch.token_ids), most)
        for request in batch.requests:
            for place, segment in enumerate(request.segments):
                last = batch.positions[request.rows] - segment.origin + segment.offset + 1
                seen[request.rows, place] = (last.clamp(max=segment.stop) - segment.start).clamp(min=0).float()
        return seen / seen.sum(-1, keepdim=True)

    def _next(self, context: Sequence[list[int]], tail: list[int]) -> int:
        """The id after a tail, which holds the question and the answer so far."""
        opening = len(tail) - tail[::-1].index(_USER) if _USER in tail else 0
        closing = tail.index(_CLOSE, opening)
        question, generated = _text(tail[opening:closing]), tail[closing + 2 :]
        if not context:  # a full prefill, where texts and question are one piece
            question = question.rpartition("\n")[2]
        documents = tuple(text for ids in context if _CLOSE not in ids and (text := _text(ids)))
        if not generated:
            self._given[question, documents] = self._look_up(question, documents)
        answer = [*self._given[question, documents].encode(), _END]
        return answer[len(generated)] if len(generated) < len(answer) else _END

    def _look_up(self, question: str, documents: tuple[str, ...]) -> str:
        if callable(self._answers):
            return self._answers(question, documents)
        if question not in self._answers:
            raise InputError(
                f"answers must hold an answer to {shown(question)}; it holds none. Add one, or pass a function that "
                f"answers any question.{did_you_mean(question, self._answers)}"
            )
        return self._answers[question]


class FakeLayout(PromptLayout):
    """The layout of `FakeModel`'s prompts: bytes, and five control tokens in the places of a chat template's."""

    def __init__(self) -> None:
        self.vocab_size = _VOCABULARY
        self.fingerprint = "fake"
        self._header = (_USER,)
        self._system_open, self._system_close, self._closing = (_SYSTEM,), (_USER,), (_CLOSE, _ASSISTANT)
        self._encode_system = self._encode = self._encode_question = encode = Remembering(_encode)
        self.past = Past((_CLOSE, _ASSISTANT), (_END, _USER), encode, encode)

    def answer_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a past answer's text."""
        return self._encode(text)

    def thinks_on(self, answer_ids: Sequence[int]) -> bool:  # noqa: ARG002 - the fake model never thinks
        """Whether an answer ends within a thought."""
        return False

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids, without control tokens."""
        return bytes(i for i in token_ids if i < 256).decode(errors="replace")

    def detokenizer(self) -> Detokenizer:
        """A detokenizer for one answer."""
        return _Bytes()


class _Bytes:
    """`prompt.answer_text.Detokenizer` of bytes."""

    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id])) if token_id < 256 else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class FakeBraid(Braid):
    """A `Braid` with a `FakeModel` and a temporary store. See the module for an example."""

    def __init__(
        self,
        answers: Answers | None = None,
        *,
        store: str | Path | None = None,
        namespace: str = "default",
        window: int = _WINDOW,
        pool_bytes: int = _POOL_BYTES,
        max_queue: int = MAX_QUEUE,
    ) -> None:
        """Open it.

        Args:
            answers: answers to questions. A question without one raises InputError. A function is called once per
                answer. None answers every question with `ANSWER`.
            store: a folder, for tests of what a second process finds. None makes a temporary one.
            namespace: as for `Braid`.
            pool_bytes, max_queue: as for `Braid`.
            window: how many tokens, that is bytes, a prompt and its answer may have.

        Raises:
            StoreError: the store can't be used.
        """
        # It lacks only `load` of a Model, and `load` is never called.
        model = cast("Model", FakeModel(_any_answer if answers is None else answers, window=window))
        pool = Pool.for_model(model, pool_bytes)
        folder = tempfile.mkdtemp(prefix="braid-fake-") if store is None else str(store)
        opened = ChunkStore(folder)
        self._adopt(Engine(model, FakeLayout(), opened, pool, namespace, max_queue=max_queue), "fake", is_tiny=False)
        self._name_model("fake")
        self._process = os.getpid()
        self._remove = weakref.finalize(self._engine, _remove, folder, self._process) if store is None else None

    def close(self) -> None:
        """Do what `Braid.close` does, and remove a temporary store. Safe to call twice; does nothing in a fork."""
        super().close()
        if self._remove and os.getpid() == self._process:
            self._remove()


def _remove(folder: str, process: int) -> None:
    """Remove a folder, but not in a fork of the process that made it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _any_answer(question: str, documents: tuple[str, ...]) -> str:  # noqa: ARG001 - the same for all
    return ANSWER


def _encode(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


def _text(ids: Sequence[int]) -> str:
    return bytes(i for i in ids if i < 256).decode(errors="replace").removesuffix("\n")


def _ids(memory: Tensor, segment: PagedSegment) -> list[int]:
    """The ids of a segment, read back from the keys of the one layer."""
    keys = memory[0, segment.pages, 0, :, 0].flatten()[segment.start : segment.stop]
    return [int(key) for key in keys.tolist()]
