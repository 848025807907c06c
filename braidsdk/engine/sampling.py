"""How the next token is chosen: the arguments, what they do to the logits, and the sampling itself.

Each step means the same as in transformers' logits processors, and the order is the same: repetition penalty over
prompt and answer, temperature, top_k, top_p, min_p. Random state belongs to one request; the global generators are
neither read nor changed.

This is the CPU's path. If a model runs on CUDA graphs, `braidsdk.kernels.sample` does the same on the device, with
other random numbers. So a seed always gives the same answer on a CPU, and always the same one on a GPU, but these two
differ.

Knows nothing about models, caches or text.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypedDict

import torch
from torch import Tensor

from braidsdk.errors import InputError, NumericsError, WindowExceededError, did_you_mean, shown
from braidsdk.models.base import GenerationDefaults, ModelConfig

DEFAULT_NEW_TOKENS = 256

LEAST_TEMPERATURE = 1e-6
"""Below this temperature an answer is greedy. Logits divided by less would leave float32's range, and only the
likeliest token would be sampled anyway."""


class SamplingOptions(TypedDict, total=False):
    """Keywords of `ask` and `stream` that say how tokens are chosen and when the answer ends. None means "not given".

    Without a temperature, or at temperature 0, the answer is greedy: the most likely token is chosen, on a tie the one
    with the lowest id. With a temperature above 0, tokens are sampled. Options that are not given then come from the
    model's generation_config.json.

    Attributes:
        max_new_tokens: the most tokens that are generated. None means 256, or what the window leaves.
        temperature: divides the logits; 0 is greedy.
        top_p: keeps the fewest most likely tokens that have this probability together; above 0 and at most 1, which
            keeps all.
        top_k: keeps this many of the most likely tokens, more on a tie; 0 keeps all.
        min_p: keeps tokens with at least this share of the likeliest token's probability; from 0 to 1.
        repetition_penalty: a value above 1 makes ids of prompt and answer less likely, in greedy answers too. None
            means the model's default, as in transformers.
        seed: the same seed gives the same answer on the same device, whatever else runs. A CPU and a GPU sample with
            different random numbers. None means a new seed each time.
        stop: the answer ends before the first of these strings that its text contains. No part of it is shown.
        stop_ids: token ids that end the answer, as the model's own end token does. They are counted, and left out of
            the text.
    """

    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_ids: Sequence[int] | None


@dataclass(frozen=True)
class SamplingParams:
    """`SamplingOptions` that are checked and complete. Only the seed may still be open.

    Attributes:
        max_new_tokens: at least 1, and within the window.
        temperature: 0.0 is greedy; then top_p, top_k, min_p and seed do nothing.
        top_p, top_k, min_p, repetition_penalty: 1.0, 0, 0.0 and 1.0 change nothing.
        seed: the seed of this request's random numbers; None takes one from the system.
        stop: strings that end the text.
        stop_ids: ids that end the answer, including the model's own.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()


def resolve(options: SamplingOptions, model: ModelConfig, prompt_tokens: int) -> SamplingParams:
    """Check what the caller asked for, and complete it with the model's defaults.

    Args:
        options: keywords of the call.
        model: gives the window, the end tokens and the generation defaults.
        prompt_tokens: length of the prompt. The window has room for at least one more token.

    Raises:
        InputError: a value can't be used.
        WindowExceededError: prompt and `max_new_tokens` exceed the window.
        TypeError: a keyword does not exist.
    """
    if unknown := options.keys() - SamplingOptions.__annotations__:
        known = SamplingOptions.__annotations__
        raise TypeError(
            f"unexpected keyword {shown(min(unknown))}; expected {', '.join(known)}.{did_you_mean(min(unknown), known)}"
        )
    temperature = _real("temperature", options.get("temperature"), 0.0, math.inf)
    shape = {
        "top_p": _real("top_p", options.get("top_p"), 0.0, 1.0, open_below=True),
        "top_k": _integer("top_k", options.get("top_k"), 0),
        "min_p": _real("min_p", options.get("min_p"), 0.0, 1.0),
    }
    if temperature is None and (given := [name for name, value in shape.items() if value is not None]):
        raise InputError(
            f"temperature must be above 0 if {' and '.join(given)} is given; got none, so the answer would be greedy. "
            "Pass temperature=0.6, for example, to sample."
        )
    if temperature is None or temperature < LEAST_TEMPERATURE:
        temperature = 0.0
    defaults: GenerationDefaults = model.generation if temperature else GenerationDefaults(top_k=0)
    penalty = _real("repetition_penalty", options.get("repetition_penalty"), 0.0, math.inf, open_below=True)
    return SamplingParams(
        max_new_tokens=_new_tokens(options.get("max_new_tokens"), model.window, prompt_tokens),
        temperature=temperature,
        top_p=defaults.top_p if shape["top_p"] is None else shape["top_p"],
        top_k=defaults.top_k if shape["top_k"] is None else int(shape["top_k"]),
        min_p=defaults.min_p if shape["min_p"] is None else shape["min_p"],
        repetition_penalty=model.generation.repetition_penalty if penalty is None else penalty,
        seed=_integer("seed", options.get("seed"), 0, 2**32),
        stop=_stop_strings(options.get("stop")),
        stop_ids=model.eos_ids | _stop_ids(options.get("stop_ids"), model.vocab_size),
    )


class Sampler:
    """Chooses the tokens of one request."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        """Prepare to choose tokens for one request.

        Args:
            params: how to choose.
            prompt_ids: the whole prompt, which the repetition penalty counts too.
        """
        self.params = params
        self._prompt = torch.tensor(prompt_ids, dtype=torch.int64)
        self._seen: Tensor | None = None
        self._chosen: list[int] = []
        self._random = torch.Generator("cpu")
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(params.seed)

    @property
    def greedy(self) -> bool:
        """Whether the next token is always the likeliest one, whatever came before."""
        return not self.params.temperature and self.params.repetition_penalty == 1.0

    @property
    def seed(self) -> int:
        """The seed of the request's random numbers, 64 bits: the given one, or one from the system."""
        return self._random.initial_seed()

    @property
    def chosen(self) -> int:
        """How many tokens were chosen."""
        return len(self._chosen)

    @property
    def said(self) -> Tensor:
        """The ids that the repetition penalty counts: those of the prompt and of the answer so far, int64."""
        return torch.cat((self._prompt, torch.tensor(self._chosen, dtype=torch.int64)))

    def pick(self, logits: Tensor) -> int:
        """Choose the next token's id. `take` then records it.

        Args:
            logits: finite, [vocab_size], on any device.
        """
        params = self.params
        if params.repetition_penalty != 1.0:
            logits = penalise(logits, self._mask(logits), params.repetition_penalty)
        if not params.temperature:
            return int(logits.argmax())
        return _sample(*candidates(logits, params), self._random)

    def take(self, token: int, finite: bool) -> None:
        """Record a token that was chosen here or on the device.

        Args:
            token: its id.
            finite: whether its logits were finite.

        Raises:
            NumericsError: they were not.
        """
        self._chosen.append(token)
        if not finite:
            raise NumericsError(
                f"Logits must be finite; got NaN or infinity for token {self.chosen} of the answer. Check the "
                "checkpoint's weights for values out of range, or open the model with dtype='float32'."
            )
        if self._seen is not None:
            with torch.inference_mode():  # `pick` made it in this mode
                self._seen[token] = True

    def _mask(self, logits: Tensor) -> Tensor:
        if self._seen is None:
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            self._seen[self._prompt.to(logits.device)] = True
        return self._seen


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make ids that were seen less likely (Keskar et al. 2019, arXiv:1909.05858).

    Args:
        logits: [vocab_size].
        seen: which ids were seen, bool [vocab_size].
        penalty: divides their positive logits and multiplies their negative ones.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that can be sampled. Applies temperature, top_k, top_p and min_p, in this order.

    Args:
        logits: finite, [vocab_size], on any device.
        params: the request's parameters, with a temperature above 0.

    Returns:
        Ids, int64 [candidates], ascending, at least one; and their scaled logits, float32 [candidates]. Both are on the
        CPU.
    """
    scores = logits.float() / params.temperature
    ids = torch.arange(len(scores), device=logits.device)
    if params.top_k:
        least = torch.topk(scores, min(params.top_k, len(scores))).values[-1]
        ids = (scores >= least).nonzero().flatten()
    ids, scores = ids.cpu(), scores[ids].cpu()
    if params.top_p < 1.0:
        order = scores.argsort()
        keep = torch.softmax(scores[order].double(), 0).cumsum(0) > 1.0 - params.top_p
        keep[-1] = True
        kept = order[keep].sort().values
        ids, scores = ids[kept], scores[kept]
    if params.min_p:
        share = torch.softmax(scores, 0)
        likely = share >= params.min_p * share.max()
        ids, scores = ids[likely], scores[likely]
    return ids, scores


def _sample(ids: Tensor, scores: Tensor, random: torch.Generator) -> int:
    """Sample one of `ids` with probability softmax(scores), by inverting the cumulative distribution in float64."""
    cumulative = torch.softmax(scores.double(), 0).cumsum(0)
    point = torch.rand(1, dtype=torch.float64, generator=random) * cumulative[-1]
    return int(ids[torch.searchsorted(cumulative, point, right=True).clamp(max=len(ids) - 1)])


def _real(name: str, value: object, low: float, high: float, *, open_below: bool = False) -> float | None:
    if value is None:
        return None
    bounds = f"{'above' if open_below else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InputError(f"{name} must be a number {bounds}; got a {type(value).__name__}.")
    number = float(value)
    if not math.isfinite(number) or number > high or number < low or (open_below and number == low):
        raise InputError(f"{name} must be {bounds}; got {number:g}.")
    return number


def _integer(name: str, value: object, low: int, stop: int | None = None) -> int | None:
    if value is None:
        return None
    bounds = f"at least {low}" + (f" and below {stop:,}" if stop else "")
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InputError(f"{name} must be an integer of {bounds}; got a {type(value).__name__}.")
    number = int(value)
    if number < low or (stop is not None and number >= stop):
        raise InputError(f"{name} must be {bounds}; got {number}.")
    return number


def _new_tokens(value: int | None, window: int, prompt_tokens: int) -> int:
    room = window - prompt_tokens
    wanted = _integer("max_new_tokens", value, 1)
    if wanted is not None and wanted > room:
        raise WindowExceededError(
            f"max_new_tokens must be at most {room:,}, what a prompt of {prompt_tokens:,} tokens leaves of the model's "
            f"window; got {wanted:,}. Ask for fewer, or compose fewer chunks."
        )
    return wanted or min(DEFAULT_NEW_TOKENS, room)


def _stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    if stop is not None and not isinstance(stop, Sequence):
        raise InputError(f"stop must be a string or a list of strings; got a {type(stop).__name__}.")
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for string in strings:
        if not isinstance(string, str) or not string:
            what = "an empty one" if isinstance(string, str) else f"a {type(string).__name__}"
            raise InputError(f"stop must hold strings of at least one character; got {what}.")
    return strings


def _stop_ids(stop_ids: Sequence[int] | None, vocab_size: int) -> frozenset[int]:
    if stop_ids is not None and not isinstance(stop_ids, Collection):
        raise InputError(f"stop_ids must be a list of token ids; got a {type(stop_ids).__name__}.")
    return frozenset(i for i in (_integer("stop_ids", each, 0, vocab_size) for each in stop_ids or ()) if i is not None)
