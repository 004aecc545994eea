"""Page numbers: which are free, and how many hold each of the others. Pure bookkeeping.

A page has one holder for each request whose table names it and one for the
prefix cache when it keeps the page. It is free again when the last lets go.
Free pages are a bitmap, so freeing costs nothing and a search for neighbours
is one vectorised sweep.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Pages = npt.NDArray[np.int64]
"""Page numbers, any shape."""


class PageAllocator:
    """Hands out page numbers 0 .. num_pages - 1.

    Attributes:
        num_pages: how many there are.
        num_free: how many nobody holds.
        holders: how many hold each page, int32 [num_pages].
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self.holders = np.zeros(num_pages, dtype=np.int32)
        self._free = np.ones(num_pages, dtype=np.bool_)

    def try_allocate(self, rows: int, length: int) -> Pages | None:
        """`rows` rows of `length` pages each, held once; None when fewer are free.

        A row's pages are neighbours wherever a gap is long enough; the smallest gap that fits is
        taken, and one that holds all rows before several that hold some.
        """
        count = rows * length
        if count > self.num_free:
            return None
        found = np.empty((rows, length), dtype=np.int64)
        placed = 0
        for start, size in self._gaps(length, count) if length else ():
            fitting = min(size // length, rows - placed)
            pages = np.arange(start, start + fitting * length)
            found[placed : placed + fitting] = pages.reshape(fitting, length)
            self._free[pages] = False
            placed += fitting
            if placed == rows:
                break
        rest = (rows - placed) * length
        if rest:
            pages = np.flatnonzero(self._free)[:rest]
            found[placed:] = pages.reshape(-1, length)
            self._free[pages] = False
        self.holders[found] = 1
        self.num_free -= count
        return found

    def try_extend(self, last: Pages, length: int) -> Pages | None:
        """The `length` pages right behind each of the pages `last` [rows], or None unless all are free.

        Result int64 [rows, length], held once.
        """
        wanted = last[:, None] + np.arange(1, length + 1)
        # Rows that lie behind each other want the same pages; then nobody gets any.
        if wanted.max() >= self.num_pages or not self._free[wanted].all() or _has_repeats(wanted):
            return None
        self._free[wanted] = False
        self.holders[wanted] = 1
        self.num_free -= wanted.size
        return wanted

    def hold(self, pages: Pages) -> None:
        """One more holder for each of these pages, which are different from each other and not free."""
        self.holders[pages] += 1

    def let_go(self, pages: Pages) -> None:
        """One holder less for each of these pages; those without any are free."""
        self.holders[pages] -= 1
        freed = pages[self.holders[pages] == 0]
        self._free[freed] = True
        self.num_free += freed.size

    def _gaps(self, length: int, count: int) -> list[tuple[int, int]]:
        """Runs of free pages (start, size) in the order to use them for rows of `length`, `count` in all."""
        edges = np.flatnonzero(np.diff(self._free.astype(np.int8), prepend=0, append=0))
        starts, sizes = edges[::2], edges[1::2] - edges[::2]
        order = np.argsort(sizes, kind="stable")
        order = order[np.searchsorted(sizes[order], length) :]
        whole = np.searchsorted(sizes[order], count)
        if whole < len(order):
            order = order[whole:]
        return list(zip(starts[order].tolist(), sizes[order].tolist(), strict=True))


def _has_repeats(pages: Pages) -> bool:
    return len(np.unique(pages)) < pages.size
