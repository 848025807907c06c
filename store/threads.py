"""Threads for I/O."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from braidsdk.errors import ClosedError, StoreError

P = ParamSpec("P")
T = TypeVar("T")


class Threads(ThreadPoolExecutor):
    """Threads that take no more jobs once the interpreter exits, and say so."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a job in a thread.

        Raises:
            ClosedError: the interpreter exits.
            StoreError: the system gives no thread.
        """
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError as error:
            if "can't start new thread" in str(error):
                raise StoreError(
                    "A thread for reading or writing must start; the system gives none. Free memory, or raise the "
                    "limit of threads (ulimit -u), and try again."
                ) from error
            raise ClosedError("The interpreter exits: nothing can be read, written or computed any more.") from error


@contextlib.contextmanager
def threads(count: int) -> Iterator[Threads]:
    """Threads that have ended when the block is left, even if that is interrupted several times, because they write to
    memory."""
    executor = Threads(count)
    try:
        yield executor
    finally:
        interrupt = None
        while True:
            try:
                executor.shutdown(cancel_futures=True)
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt:
            raise interrupt
