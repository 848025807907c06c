"""How the next token is chosen: the arguments, their checks, and what one request's choices go by.

Each step means the same as in transformers' logits processors, and the order is the same: repetition penalty over
prompt and answer, temperature, top_k, top_p, min_p. Random state belongs to one request; the global generators are
neither read nor changed.

`braidsdk.kernels.sample` chooses, by one rule on every device: a seed gives the same random numbers everywhere. Answers
can differ between devices only as far as their logits do.

Knows nothing about models, caches or text.
"""

import math
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypedDict

import torch
from torch import Tensor

from braidsdk.errors import InputError, NumericsError, WindowExceededError, did_you_mean, shown
from braidsdk.kernels.sample import Choices
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
        repetition_penalty: from 0.01 to 1e6; a value above 1 makes ids of prompt and answer less likely, in greedy
            answers too. None means the model's default, as in transformers.
        seed: the same seed gives the same answer on the same device, whatever else runs, and the same random numbers
            on every device. None means a new seed each time.
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
    penalty = _real("repetition_penalty", options.get("repetition_penalty"), 0.01, 1e6)
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
    """What the choices of one request's tokens go by."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        """Prepare to choose tokens for one request.

        Args:
            params: how to choose.
            prompt_ids: the whole prompt, which the repetition penalty counts too.
        """
        self.params = params
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self._prompt = torch.tensor(prompt_ids, dtype=torch.int64)
        self._chosen: list[int] = []

    @property
    def greedy(self) -> bool:
        """Whether the next token is always the likeliest one, whatever came before."""
        return not self.params.temperature and self.params.repetition_penalty == 1.0

    def describe(self, choices: Choices, at: int, *, ahead: int = 0) -> None:
        """Say in row `at` of `choices` how the next token is chosen, `ahead` tokens after the last recorded one."""
        params, device = self.params, choices.shape.device

        def there(values: Tensor) -> Tensor:
            return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values

        shape = (params.temperature, params.top_p, params.min_p, params.repetition_penalty)
        draws = (
            min(params.top_k, choices.seen.shape[1]),
            self.seed - (self.seed >> 63 << 64),
            len(self._chosen) + ahead,
        )
        choices.shape[:, at] = there(torch.tensor(shape, dtype=torch.float64))
        choices.draws[:, at] = there(torch.tensor(draws))
        if params.repetition_penalty != 1.0:
            choices.seen[at] = False
            choices.seen[at, there(torch.cat((self._prompt, torch.tensor(self._chosen, dtype=torch.int64))))] = True

    def take(self, token: int, finite: bool) -> None:
        """Record a token that was chosen.

        Args:
            token: its id.
            finite: whether its logits were finite.

        Raises:
            NumericsError: they were not.
        """
        self._chosen.append(token)
        if not finite:
            raise NumericsError(
                f"Logits must be finite; got NaN or infinity for token {len(self._chosen)} of the answer. Check the "
                "checkpoint's weights for values out of range, or open the model with dtype='float32'."
            )


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
