"""Which pages of a pool are free."""

from bisect import bisect
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise


class FreePages:
    """Free pages. Pages that follow one another in memory are given out together: a CPU's attention takes them at once.

    They are kept as runs of consecutive ids, (first, one past the last), ascending. No two runs adjoin.
    """

    def __init__(self, count: int) -> None:
        """Pages 0 to `count` - 1, all free."""
        self._runs = [(0, count)] if count else []
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(range(*run) for run in self._runs)

    def take(self, wanted: int) -> list[int]:
        """Take so many pages, at most all: of the first run that has enough; without one the longest, and so on."""
        taken: list[int] = []
        while lacking := wanted - len(taken):
            fits = (at for at, (start, stop) in enumerate(self._runs) if stop - start >= lacking)
            at = next(fits, None)
            if at is None:
                at = max(range(len(self._runs)), key=lambda at: self._runs[at][1] - self._runs[at][0])
            start, stop = self._runs.pop(at)
            cut = min(stop, start + lacking)
            taken += range(start, cut)
            if cut < stop:
                self._runs.insert(at, (cut, stop))
        self._count -= wanted
        return taken

    def give(self, pages: Sequence[int]) -> None:
        """Take pages back."""
        for start, stop in runs_of(sorted(pages)):
            at = bisect(self._runs, (start, stop))
            if at < len(self._runs) and self._runs[at][0] == stop:
                stop = self._runs.pop(at)[1]
            if at and self._runs[at - 1][1] == start:
                at -= 1
                start = self._runs.pop(at)[0]
            self._runs.insert(at, (start, stop))
        self._count += len(pages)


def runs_of(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of consecutive ids, each as its first id and the id after its last."""
    cuts = [0, *(i for i in range(1, len(ids)) if ids[i] != ids[i - 1] + 1), len(ids)]
    return [(ids[start], ids[stop - 1] + 1) for start, stop in pairwise(cuts) if stop > start]
