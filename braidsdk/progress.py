"""Progress bars on stderr: one shows a `Progress`, the other counts steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from braidsdk.types import Progress, duration


class ProgressBar:
    """Shows tokens done, tokens per second and the time left, if stderr is a terminal. It is a context manager and an
    `on_progress` callback. The bar disappears when the context is left."""

    def __init__(self, *, console: Console | None = None) -> None:
        self._bar = Bar(
            TextColumn("registering"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens{task.fields[rate]}{task.fields[left]}"),
            console=console or Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("", rate="", left="", visible=False)

    def __call__(self, progress: Progress) -> None:
        rate, left = progress.tokens_per_s, progress.seconds_left
        self._bar.update(
            self._task,
            completed=progress.done_tokens,
            total=progress.total_tokens,
            visible=True,
            rate="" if rate is None else f", {rate:,.0f} tokens/s",
            left="" if left is None else f", {duration(left)} left",
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


@contextmanager
def steps_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work of few steps, if stderr is a terminal. It appears with the first step, and disappears when the
    context is left.

    Yields:
        A function to call with the number of steps done and of all steps.
    """
    console = Console(stderr=True)
    bar = Bar(TextColumn(label), BarColumn(), MofNCompleteColumn(), console=console, transient=True)
    task = bar.add_task("")

    def show(done: int, total: int) -> None:
        if console.is_terminal:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
