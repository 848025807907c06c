"""A lock that is granted in the order in which it was asked for."""

from collections import deque
from threading import Lock
from types import TracebackType


class FairLock:
    """First come, first served, not re-entrant.

    `threading.Lock` lets a thread that releases and asks again overtake those that wait: of two streams the second
    would stand still until the first has ended.
    """

    def __init__(self) -> None:
        self._mutex = Lock()
        self._waiting: deque[Lock] = deque()
        self._held = False

    def acquire(self) -> None:
        """Wait for the lock."""
        with self._mutex:
            if not self._held:  # then nobody waits: a release hands over to who does
                self._held = True
                return
            gate = Lock()
            gate.acquire()
            self._waiting.append(gate)
        try:
            gate.acquire()
        except BaseException:  # KeyboardInterrupt while waiting
            with self._mutex:
                handed_over = gate not in self._waiting
                if not handed_over:
                    self._waiting.remove(gate)
            if handed_over:
                self.release()
            raise

    def try_acquire(self) -> bool:
        """Take the lock if that needs no waiting. Never blocks, so the garbage collector may call it at any point."""
        if not self._mutex.acquire(blocking=False):
            return False
        try:
            if self._held:
                return False
            self._held = True
            return True
        finally:
            self._mutex.release()

    def release(self) -> None:
        """Hand the lock to who has waited longest."""
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
