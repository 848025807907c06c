"""`braid doctor --layers MODEL`: every layer against transformers', with errors measured from float64."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from braidsdk.cli.demo import load_samples
from braidsdk.cli.model_checks import free_memory, weight_bytes
from braidsdk.engine.kernel_choice import choose_backends, parse_kernels
from braidsdk.errors import BraidError
from braidsdk.fidelity.agreement import Agreement, agreement
from braidsdk.fidelity.layers import compare_layers
from braidsdk.models.base import Model
from braidsdk.models.device import parse_device, parse_dtype, parse_weights
from braidsdk.models.registry import find_checkpoint, load_model
from braidsdk.prompt.layout import PromptLayout
from braidsdk.types import LEVEL_CONTEXT, LEVEL_SYSTEM, size

DOCUMENT_TOKENS = 320
"""At least so many: from 256 rows on, attention takes the kernel of a prefill."""

ANSWER_TOKENS = 8

RATIO = 1.25
"""How many times transformers' error ours may be. Over a few hundred rows of one text it scatters by some hundredths,
over the few of an answer by a tenth."""

SMALL = 1e-5
"""How much more it may be: float32 has rounded a few times."""

INT8_SMALL = 0.02
"""The same with weights in int8, each rounded to 1/254 of the largest of its group: 0.01 to 0.02 in SmolLM2-135M and in
Qwen2.5-0.5B."""


@dataclass(frozen=True)
class PassError:
    """Relative errors of one layer over the tokens of one pass: root mean square over tokens of the error's norm over
    the norm of what the layer adds to its input, both in float64.

    Attributes:
        name: "documents", "question" (each computed in one go) or "answer" (token by token).
        ours: of our model, on the kernels that it runs on here.
        transformers: of transformers in the same dtype.
        small: how much ours may be beside `RATIO` times theirs.
    """

    name: str
    ours: float
    transformers: float
    small: float = SMALL

    @property
    def ratio(self) -> float:
        """Ours over transformers'."""
        return self.ours / self.transformers if self.transformers else math.inf

    @property
    def ok(self) -> bool:
        return self.ours <= self.small + RATIO * self.transformers


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        layer: its index.
        largest_k_norm: the largest magnitude among its K-norm weights; None if it has none. Tens to a hundred are
            normal in Qwen3.
        passes: its errors.
    """

    layer: int
    largest_k_norm: float | None
    passes: tuple[PassError, ...]

    @property
    def ok(self) -> bool:
        return all(each.ok for each in self.passes)


@dataclass(frozen=True)
class LayersReport:
    """All layers of a model, and what it was computed in and on."""

    model: str
    dtype: str
    device: str
    backends: str
    layers: tuple[LayerReport, ...]
    agreement: Agreement
    weights: str = "auto"

    @property
    def allowed(self) -> str:
        """What an error may be, in words."""
        return f"{RATIO} times transformers' error" + (f" and {INT8_SMALL}" if self.weights == "int8" else "")

    @property
    def failed(self) -> list[int]:
        return [each.layer for each in self.layers if not each.ok]


def check_layers(model: str, device: str, dtype: str, weights: str = "auto") -> LayersReport:
    """Compute a short text with both, from transformers' input of each layer, and then as a whole.

    Raises:
        BraidError: the model can't be opened, or does not fit in memory twice.
    """
    folder, target = find_checkpoint(model), parse_device(device)
    if folder.is_file():
        raise BraidError(
            f"The model must be a folder, to be compared with transformers' layers; got the file {model!r}. "
            "Check the checkpoint that it was made of."
        )
    needed, free = 2 * weight_bytes(folder), free_memory(target)
    if needed > free:
        raise BraidError(
            f"Two copies of {model!r} need about {size(needed)}; {size(free)} are free. Close other programs, or check "
            "a smaller model of the same family."
        )
    choose = partial(choose_backends, parse_kernels(None))
    int8 = parse_weights(weights)
    ours = load_model(folder, device=target, dtype=parse_dtype(dtype), int8=int8, choose=choose)
    theirs: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=ours.dtype)
    theirs.to(ours.device).eval()
    pieces = text(PromptLayout(folder))
    return LayersReport(
        model=model,
        dtype=str(ours.dtype).removeprefix("torch."),
        device=str(ours.device),
        backends=str(ours.backends),
        layers=reports(ours, theirs, pieces, INT8_SMALL if int8 else SMALL),
        agreement=agreement(ours, theirs, pieces),
        weights=weights,
    )


def text(layout: PromptLayout) -> list[tuple[int, ...]]:
    """A system prompt, documents, and a question with the first tokens of an answer."""
    samples = load_samples()
    pieces = [layout.chunk_ids(LEVEL_SYSTEM, samples.system)]
    for document in samples.documents.values():
        if sum(map(len, pieces)) < DOCUMENT_TOKENS:
            pieces.append(layout.chunk_ids(LEVEL_CONTEXT, document))
    answer = layout.plain_ids(next(iter(samples.documents.values())))[:ANSWER_TOKENS]
    return [*pieces, (*layout.question_ids(samples.questions[0].question), *answer)]


def reports(
    ours: Model, theirs: nn.Module, pieces: list[tuple[int, ...]], small: float = SMALL
) -> tuple[LayerReport, ...]:
    """A report for each layer, over a text whose last `ANSWER_TOKENS` tokens are an answer's."""
    *documents, tail = map(len, pieces)
    names, counts = ("documents", "question", "answer"), [sum(documents), tail - ANSWER_TOKENS, ANSWER_TOKENS]
    decoder: Any = theirs.model
    found = []
    for outputs in compare_layers(ours, theirs, pieces, answer_tokens=ANSWER_TOKENS):
        errors = (outputs.relative_errors(got).split(counts) for got in (outputs.ours, outputs.theirs))
        passes = (
            PassError(name, _rms(our), _rms(their), small) for name, our, their in zip(names, *errors, strict=True)
        )
        k_norm = getattr(decoder.layers[outputs.index].self_attn, "k_norm", None)
        largest = None if k_norm is None else float(k_norm.weight.detach().abs().max())
        found.append(LayerReport(outputs.index, largest, tuple(passes)))
    return tuple(found)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
