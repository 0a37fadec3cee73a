"""The page table of a KVCache: which pages hold the tokens of each segment. On the host, in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flexjag.errors import KVCacheError, SegmentError, ShapeError, explain_values

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PageTable:
    """Pages and lengths of S segments. Immutable: every change is a new table, so that one that fails changes nothing.

    A segment is its first tokens, if :meth:`trim` kept some, and a tail, which grows; both begin in pages of their own.
    Segments may hold the same page. A page that no segment holds is free.

    Attributes:
        page: Tokens per page.
        pages: ``[N]``, the pages of all segments, packed: of each segment those of its first tokens, then its tail's.
        lengths: ``[S]``, the number of tokens that are held.
        seen: ``[S]``, the number of tokens ever held: the position of the next one.
        first: ``[S]``, the number of first tokens that lie apart from the tail; 0 where nothing between was dropped.
        skip: ``[S]``, the row of the tail's first token in its page.
    """

    page: int
    pages: Integers
    lengths: Integers
    seen: Integers
    first: Integers
    skip: Integers

    @staticmethod
    def empty(page: int, segments: int) -> PageTable:
        """A table of segments without tokens."""
        zeros = np.zeros(segments, np.int64)
        return PageTable(page, np.zeros(0, np.int64), zeros, zeros, zeros, zeros)

    @property
    def first_pages(self) -> Integers:
        """``[S]``, the number of pages that hold the first tokens."""
        return -(-self.first // self.page)

    @property
    def tail_end(self) -> Integers:
        """``[S]``, the row behind the last token, counted from the beginning of the tail's first page."""
        return self.skip + self.lengths - self.first

    @property
    def counts(self) -> Integers:
        """``[S]``, the number of pages of each segment."""
        return self.first_pages - (-self.tail_end // self.page)

    @property
    def ends(self) -> Integers:
        """``[S]``, the end of each segment in `pages`."""
        return np.cumsum(self.counts)

    def holders(self, capacity: int) -> Integers:
        """``[capacity]``, how often each page is held."""
        return np.bincount(self.pages, minlength=capacity)

    def runs(self) -> tuple[Integers, Integers]:
        """Rows of the storage that hold the tokens, in the packed order: one run of rows for each page ``[N]``.

        Returns:
            What has to be added to the packed index of each of a run's tokens to get its row, and their number.
        """
        segment = np.repeat(np.arange(len(self.lengths)), self.counts)
        at = np.arange(len(self.pages)) - (self.ends - self.counts + self.first_pages)[segment]  # in the tail; or < 0
        low = np.where(at == 0, self.skip[segment], 0)
        first_end = self.first[segment] - (at + self.first_pages[segment]) * self.page
        high = np.minimum(self.page, np.where(at < 0, first_end, self.tail_end[segment] - at * self.page))
        count = high - low
        return self.pages * self.page + low - (np.cumsum(count) - count), count

    def extended(
        self, new: Integers, capacity: int, grow: Callable[[int], int]
    ) -> tuple[PageTable, tuple[Integers, Integers]]:
        """Make room for more tokens. A page that is to be written to, but that others hold as well, is replaced.

        Args:
            new: ``[S]``, the number of further tokens of each segment.
            capacity: The number of pages that there are.
            grow: Called with the number of pages that lack; returns the number of pages that there are from now on.

        Returns:
            The table, and pages to be copied: from which, to which.
        """
        holders = self.holders(capacity)
        before, after = -(-self.tail_end // self.page), -(-(self.tail_end + new) // self.page)
        written = np.flatnonzero((new > 0) & (self.tail_end % self.page != 0))
        last = self.ends[written] - 1
        last = last[holders[self.pages[last]] > 1]
        fresh = int((after - before).sum()) + len(last)
        free = np.flatnonzero(holders == 0)
        if fresh > len(free):
            free = np.concatenate([free, np.arange(capacity, grow(fresh - len(free)))])
        counts = self.counts + after - before
        kept = ranges(np.cumsum(counts) - counts, self.counts)
        is_new = np.ones(int(counts.sum()), bool)
        is_new[kept] = False
        pages = np.empty(len(is_new), np.int64)
        pages[kept] = self.pages
        pages[kept[last]] = free[: len(last)]
        pages[is_new] = free[len(last) : fresh]
        table = PageTable(self.page, pages, self.lengths + new, self.seen + new, self.first, self.skip)
        return table, (self.pages[last], free[: len(last)])

    def selected(self, index: Integers) -> PageTable:
        """The segments of these indices, which share their pages."""
        counts = self.counts[index]
        pages = self.pages[ranges(self.ends[index] - counts, counts)]
        rest = (x[index] for x in (self.lengths, self.seen, self.first, self.skip))
        return PageTable(self.page, pages, *rest)

    def added(self, count: int) -> PageTable:
        """The table with further segments without tokens."""
        more = np.zeros(count, np.int64)
        rest = (np.concatenate([x, more]) for x in (self.lengths, self.seen, self.first, self.skip))
        return PageTable(self.page, self.pages, *rest)

    def rewound(self, count: Integers) -> PageTable:
        """The table without the last tokens.

        Raises:
            KVCacheError: If a segment has fewer, not counting first tokens that :meth:`trim` kept.
        """
        over = np.flatnonzero(count > self.lengths - self.first)
        if len(over):
            s = int(over[0])
            rule = "must be at most the tokens of a segment behind those that trim() kept by keep_first"
            raise KVCacheError(explain_values("count", rule, **self._seen(s), **{f"count[{s}]": int(count[s])}))
        table = PageTable(self.page, self.pages, self.lengths - count, self.seen - count, self.first, self.skip)
        pages = self.pages[ranges(self.ends - self.counts, table.counts)]
        return PageTable(self.page, pages, table.lengths, table.seen, self.first, self.skip)

    def trimmed(self, keep_last: Integers, keep_first: int) -> PageTable:
        """The table without what lies between the first and the last tokens of each segment.

        Raises:
            KVCacheError: If a segment has dropped its first tokens, or others than those, before.
        """
        dropped = np.maximum(0, self.lengths - keep_first - keep_last)
        whole = self.seen == self.lengths
        bad = np.flatnonzero((dropped > 0) & ~whole & (self.first != keep_first))
        if len(bad):
            s = int(bad[0])
            rule = "must be the same in all trims of a segment, as what it would add is dropped"
            seen: dict[str, Any] = {"keep_first": keep_first, "before": int(self.first[s]), "segment": s}
            raise KVCacheError(explain_values("keep_first", rule, **seen))
        first = np.where(dropped > 0, keep_first, self.first)
        # In a segment that was whole the first tokens and the tail may end and begin in the same page, held twice.
        start = np.where((dropped > 0) & whole, keep_first, self.skip) + dropped
        tail = self.ends - self.counts + self.first_pages + start // self.page
        first_pages = -(-first // self.page)
        pieces = ranges(
            np.stack([self.ends - self.counts, tail], 1).ravel(), np.stack([first_pages, self.ends - tail], 1).ravel()
        )
        return PageTable(self.page, self.pages[pieces], self.lengths - dropped, self.seen, first, start % self.page)

    def _seen(self, s: int) -> dict[str, int]:
        return {f"lengths[{s}]": int(self.lengths[s]), "kept": int(self.first[s])}


def ranges(starts: Integers, counts: Integers) -> Integers:
    """The integers from each start, so many of them, one range after the other.

    >>> ranges(np.array([5, 0, 8]), np.array([2, 0, 3])).tolist()
    [5, 6, 8, 9, 10]
    """
    return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))


def is_integer(given: object) -> bool:
    """Whether it is an integer of Python or NumPy, and no truth value."""
    return isinstance(given, int | np.integer) and not isinstance(given, bool)


def indices_of(segments: Any, count: int) -> Integers:
    """Indices of some of `count` segments, given as such or as one bool for each: a tensor, an array or a list.

    Raises:
        SegmentError: If they are neither, or an index is out of range.
    """
    given = np.asarray(segments.cpu() if isinstance(segments, Tensor) else segments)
    if given.dtype == bool and given.shape == (count,):
        return np.flatnonzero(given)
    if given.ndim == 1 and given.size == 0:
        return np.zeros(0, np.int64)
    if given.dtype.kind not in "iu" or given.ndim != 1:
        rule = "must be indices, or one bool for each segment"
        seen: dict[str, Any] = {"dtype": str(given.dtype), "shape": given.shape, "segments": count}
        raise SegmentError(explain_values("segments", rule, **seen))
    wrong = given[(given < 0) | (given >= count)]
    if len(wrong):
        seen = {"index": int(wrong[0]), "segments": count}
        raise SegmentError(explain_values("segments", "must be indices of segments", **seen))
    return given.astype(np.int64)


def per_segment(name: str, given: Any, count: int) -> Integers:
    """One number for each of `count` segments, of one for all or as many: a tensor, an array or a list.

    Raises:
        ShapeError: If they are no integers of at least 0, or not so many.
    """
    found = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
    found = found.astype(np.int64) if found.size == 0 else found
    if found.dtype.kind not in "iu" or found.shape not in ((), (count,)) or (found < 0).any():
        rule = "must be an int, or one for each segment, of at least 0"
        raise ShapeError(explain_values(name, rule, **{name: given}, segments=count))
    return np.broadcast_to(found.astype(np.int64), (count,))
