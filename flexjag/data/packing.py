"""Best-fit-decreasing packing of samples into batches under a budget, by counting lengths."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from flexjag.errors import DataError, explain_values
from flexjag.offsets import as_int

UNLIMITED = 2**62


@dataclass(frozen=True)
class Budget:
    """What a batch may hold at most. None is unlimited, but not for both tokens and squares.

    Attributes:
        max_tokens: Tokens of a batch.
        max_squares: Sum of its squared lengths, which attention costs time for.
        max_samples: Samples of a batch.
    """

    max_tokens: int | None = None
    max_squares: int | None = None
    max_samples: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_squares", "max_samples"):
            value = as_int(getattr(self, name))
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise DataError(explain_values(name, "must be an int of at least 1", **{name: value}))
            object.__setattr__(self, name, value)
        if self.max_tokens is None and self.max_squares is None:
            raise DataError(explain_values("max_tokens, max_squares", "at least one must be given"))

    @property
    def longest(self) -> int:
        """The longest sample that fits a batch, in tokens."""
        tokens = UNLIMITED if self.max_tokens is None else self.max_tokens
        return tokens if self.max_squares is None else min(tokens, math.isqrt(self.max_squares))


class Packs(NamedTuple):
    """Samples in packs. Pack b is ``order[bounds[b]:bounds[b+1]]``.

    Attributes:
        order: ``[N]`` int64, indices of samples.
        bounds: ``[B+1]`` int64.
    """

    order: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: Any) -> Any:
        """Indices of the samples of a pack, ``[n]``."""
        return self.order[self.bounds[index] : self.bounds[index + 1]]

    def sums(self, per_sample: np.ndarray) -> np.ndarray:
        """Sums ``[B]`` over the packs of a value per sample ``[N]``."""
        total = np.concatenate([np.zeros(1, per_sample.dtype), np.cumsum(per_sample[self.order])])
        return total[self.bounds[1:]] - total[self.bounds[:-1]]

    def take(self, chosen: np.ndarray) -> Packs:
        """The packs of the given indices, in their order."""
        sizes = np.diff(self.bounds)[chosen]
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        index = np.arange(bounds[-1]) + np.repeat(self.bounds[chosen] - bounds[:-1], sizes)
        return Packs(self.order[index], bounds)


def check_lengths(lengths: Sequence[int] | np.ndarray | Tensor, name: str = "lengths") -> np.ndarray:
    """The lengths of samples as int64 ``[N]``.

    Raises:
        DataError: If they are not integers, or negative.
    """
    found = np.asarray(lengths.cpu() if isinstance(lengths, Tensor) else lengths)
    if found.ndim != 1 or (found.dtype.kind not in "iu" and found.size):
        raise DataError(explain_values(name, "must be integers [N]", shape=found.shape, dtype=str(found.dtype)))
    found = found.astype(np.int64)
    if found.size and found.min() < 0:
        at = int(found.argmin())
        raise DataError(explain_values(name, "must not be negative", **{f"{name}[{at}]": int(found[at])}))
    return found


def fit(lengths: np.ndarray, budget: Budget, truncate: bool) -> np.ndarray:
    """The lengths ``[N]``, cut to the longest that fits a batch if `truncate`.

    Raises:
        DataError: If one does not fit and `truncate` is False.
    """
    over = np.flatnonzero(lengths > budget.longest)
    if not over.size:
        return lengths
    if not truncate:
        at = int(over[0])
        rule = "must fit the budget of a batch; truncate=True cuts those that do not"
        seen = {f"lengths[{at}]": int(lengths[at]), "longest": budget.longest, "samples_over": int(over.size)}
        raise DataError(explain_values("lengths", rule, **seen, budget=budget))
    return np.minimum(lengths, budget.longest)


def best_fit_decreasing(lengths: np.ndarray, budget: Budget) -> Packs:
    """Pack samples, the longest first, each into the pack with the least room that still takes it.

    Room is the longest sample that a pack still takes, by all of its budgets. Samples of a length and packs of the same
    room are treated together, so that time is O(N log N + moves of groups), and exactly what one sample after the other
    would give. Samples of equal length are taken in their given order.

    Args:
        lengths: ``[N]`` int64, each fits the budget. A sample without tokens takes the place of one.
        budget: What a pack holds.
    """
    count = len(lengths)
    if not count:
        return Packs(np.zeros(0, np.int64), np.zeros(1, np.int64))
    costs = np.maximum(lengths, 1)
    order = np.argsort(-costs, kind="stable")
    sizes, counts = np.unique(costs, return_counts=True)
    placed = _place(sizes[::-1].tolist(), counts[::-1].tolist(), budget)
    pack_of = np.repeat(np.array(placed.packs, np.int64), np.array(placed.samples, np.int64))
    into = np.argsort(pack_of, kind="stable")
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(pack_of, minlength=placed.total))])
    return Packs(order[into], bounds)


class _Placed(NamedTuple):
    """Samples in decreasing order of length: `samples[i]` of them go to pack `packs[i]`; there are `total` packs."""

    packs: list[int]
    samples: list[int]
    total: int


def _place(sizes: Sequence[int], counts: Sequence[int], budget: Budget) -> _Placed:
    tokens, squares, slots = (
        UNLIMITED if x is None else x for x in (budget.max_tokens, budget.max_squares, budget.max_samples)
    )
    packs: list[int] = []
    samples: list[int] = []
    total = 0
    rooms: list[int] = []  # sorted; each has its groups: packs by (tokens, squares, samples) left
    groups: dict[int, dict[tuple[int, int, int], list[int]]] = {}

    def put(left: tuple[int, int, int], members: list[int]) -> None:
        room = 0 if not left[2] else left[0] if squares == UNLIMITED else min(left[0], math.isqrt(left[1]))
        if not room:
            return
        if room not in groups:
            groups[room] = {}
            insort(rooms, room)
        known = groups[room].get(left)
        if known is None:
            groups[room][left] = members
        else:
            known += members

    def fill(left: tuple[int, int, int], members: list[int], size: int, todo: int) -> int:
        """Fill packs one after the other; the rest of them stay as they are. Returns how many samples were placed."""
        t, s, n = left
        most = min(t // size, s // size**2, n)
        full = min(len(members), todo // most)
        packs.extend(members[:full])
        samples.extend([most] * full)
        if full:
            put((t - most * size, s - most * size**2, n - most), members[:full])
        done = full * most
        if full < len(members):
            some = todo - done
            if some:
                packs.append(members[full])
                samples.append(some)
                put((t - some * size, s - some * size**2, n - some), [members[full]])
                full, done = full + 1, todo
            if full < len(members):
                put(left, members[full:])
        return done

    for size, todo in zip(sizes, counts, strict=True):
        while todo:
            at = bisect_left(rooms, size)
            if at == len(rooms):
                break
            here = groups.pop(rooms.pop(at))
            while here and todo:
                left, members = here.popitem()
                todo -= fill(left, members, size, todo)
            for left, members in here.items():
                put(left, members)
        if todo:
            new = -(-todo // min(tokens // size, squares // size**2, slots))
            fill((tokens, squares, slots), list(range(total, total + new)), size, todo)
            total += new
    return _Placed(packs, samples, total)
