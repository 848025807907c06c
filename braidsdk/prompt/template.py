"""A checkpoint's chat template, rendered the same way on every day.

Templates may show the date: Llama 3.2's does. With today's date every stored entry would belong to one day. So a
template is told that today is `DAY`, which Llama's templates take themselves where they know no date.
"""

import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from braidsdk.errors import UnsupportedModelError, shown
from braidsdk.prompt.tokenizer import TextTokenizer

DAY = datetime(2024, 7, 26)
"""The day that every chat template is told."""

_OTHER_DAY = datetime(2031, 12, 3, 11, 8, 9)

Messages = Sequence[Mapping[str, str]]


class LayoutWarning(UserWarning):
    """A prompt differs from what the model's chat template gives for the same text, or its answers may not end."""


class ChatTemplate:
    """The chat template of one checkpoint."""

    def __init__(self, tokenizer: TextTokenizer, *, thinking: bool) -> None:
        """Check that it gives the same text each time.

        Args:
            tokenizer: the tokenizer whose template it is.
            thinking: passed to the template as `enable_thinking`.

        Raises:
            UnsupportedModelError: it fails, or its text depends on chance.
        """
        self._tokenizer, self._thinking = tokenizer, thinking
        try:
            self.source = tokenizer.template
        except Exception as error:  # it holds several, and none is the default
            raise UnsupportedModelError(
                f"The tokenizer must hold one chat template, or a default one: {str(error)[:200]}. Save it with one."
            ) from error
        once = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Well?"}]
        texts = [self.text(once) for _ in range(4)]
        if len(set(texts)) > 1:
            raise UnsupportedModelError(
                "The chat template must give the same text each time; it gives other texts for the same messages. Take "
                "out what is random in chat_template.jinja."
            )
        if self._render(once, day=_OTHER_DAY) != texts[0]:
            warnings.warn(
                "The chat template shows today's date, with which no stored entry could be used on another day. The "
                f"model is told that today is {DAY:%d %b %Y}. Put the date into the question if the answer needs it.",
                LayoutWarning,
                stacklevel=4,
            )

    def text(self, messages: Messages, *, opened: bool = True) -> str:
        """The text of messages.

        Args:
            messages: with "role" and "content".
            opened: whether the header of the assistant's answer follows.

        Raises:
            UnsupportedModelError: the template fails on them.
        """
        return str(self._render(messages, opened=opened))

    def ids(self, messages: Messages) -> tuple[int, ...]:
        """The token ids that transformers gives for messages and the header of an answer; raises what `text` does."""
        return tuple(self._render(messages, tokenize=True))

    def _render(self, messages: Messages, *, opened: bool = True, day: datetime = DAY, tokenize: bool = False) -> Any:
        try:
            return self._tokenizer.render(
                messages,
                template=_on(day, self.source),
                tokenize=tokenize,
                opened=opened,
                thinking=self._thinking,
            )
        except Exception as error:  # Jinja's, and whatever an expression of the template raises
            roles = ", ".join(message["role"] for message in messages)
            raise UnsupportedModelError(
                f"The chat template must take messages of {roles}; got an error. The template fails: "
                f"{type(error).__name__}: {str(error)[:200]}. Use the checkpoint's own template, or a checkpoint that "
                "takes a system message."
            ) from error


def _on(day: datetime, source: str) -> str:
    """A template with a macro in place of transformers' function that gives the date. Functions can't be passed."""
    if "strftime_now" not in source:
        return source
    replaced = "".join(f" | replace({form!r}, {text!r})" for form, text in _written(day).items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro +%}}{source}"


def _written(day: datetime) -> dict[str, str]:
    """What `strftime` writes for its directives in the C locale: a process in another one has the same prompts."""
    names = {
        "%A": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")[day.weekday()],
        "%B": (
            *("January", "February", "March", "April", "May", "June"),
            *("July", "August", "September", "October", "November", "December"),
        )[day.month - 1],
    }
    names |= {"%a": names["%A"][:3], "%b": names["%B"][:3], "%h": names["%B"][:3], "%p": ("AM", "PM")[day.hour // 12]}
    numbers = {f"%{letter}": day.strftime(f"%{letter}") for letter in "dHIjmMSUwWyY"}
    bare = {f"%-{form[1:]}": number.lstrip("0") or "0" for form, number in numbers.items()}
    date, time = f"{day:%m/%d/%y}", f"{day:%H:%M:%S}"
    whole = {"%c": f"{names['%a']} {names['%b']} {day.day:2} {time} {day.year}", "%x": date, "%D": date, "%X": time}
    whole |= {"%T": time, "%R": f"{day:%H:%M}", "%F": f"{day:%Y-%m-%d}", "%e": f"{day.day:2}", "%Z": "", "%z": ""}
    return {**bare, **whole, **names, **numbers}


def between(text: str, *marks: str) -> tuple[str, ...]:
    """What stands before, between and after marks in a rendered text, each of which stands there once and in order.

    Raises:
        UnsupportedModelError: they do not.
    """
    parts, rest = [], text
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found or text.count(mark) > 1:
            raise UnsupportedModelError(
                "The chat template must show messages as they are given, each once and in order; got "
                f"{shown(text, 300)}. Use a checkpoint with a template that does, such as Qwen3's."
            )
        parts.append(before)
    return (*parts, rest)
