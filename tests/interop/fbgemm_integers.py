"""FBGEMM's functions of integers beside plain Python: the table that its tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from fbgemm_loops import Arguments, Batch
from torch import Tensor

HASH_SIZES = [0, 7, 12]
"""Where the hash spaces of two features begin, and the end of the last one's, which indices may exceed."""


@dataclass(frozen=True)
class IntegerCase:
    """One way to call one function.

    Attributes:
        run: The call, on a namespace with FBGEMM's functions and the arguments. Returns a tensor or several.
        loop: The same lists of numbers, from the batch.
        oracle: Whether FBGEMM has it on CPU.
        some: Whether FBGEMM wants a segment.
    """

    run: Callable[..., Any]
    loop: Callable[[Batch], Sequence[object]]
    oracle: bool = True
    some: bool = False


def keys_of(b: Batch) -> list[list[int]]:
    return [list(b.lengths), list(b.lengths[::-1])]


def sums(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def numbers(total: int) -> list[int]:
    """Indices under 7, and a last one that no hash size allows."""
    return [5 * i % 7 for i in range(total - 1)] + [30] * (total > 0)


def expanded(b: Batch) -> list[int]:
    starts = sums(b.lengths)
    order = sorted(range(len(b.lengths)), key=lambda s: b.lengths[s])
    return [i for s in order for i in range(starts[s], starts[s + 1])]


def cut(values: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    return [list(values[lo:hi]) for lo, hi in pairwise(sums(lengths))]


def unique(b: Batch) -> tuple[list[int], list[int], list[int], list[int]]:
    found: list[int] = []
    places: list[int] = []
    lengths: list[int] = []
    for own in cut(numbers(2 * sum(b.lengths)), [sum(k) for k in keys_of(b)]):
        keys = sorted(set(own))
        places += [len(found) + keys.index(i) for i in own]
        found += keys
        lengths += [len(keys[s :: len(b.lengths)]) for s in range(len(b.lengths))]
    return lengths, sums(lengths), found, places


def hash_sizes(b: Batch) -> tuple[list[int], list[int]]:
    parts = cut(numbers(2 * sum(b.lengths)), [sum(k) for k in keys_of(b)]) if b.lengths else []
    return sums([max(own, default=-1) + 1 for own in parts]), list(range(len(parts) + 1))


def _expand(f: Any, b: Arguments) -> Tensor:
    order = b.n.argsort(stable=True).to(b.n.dtype)
    after = f.asynchronous_complete_cumsum(b.n.index_select(0, order))
    return f.expand_into_jagged_permute(order, b.offsets, after, b.total)


def indices_of(b: Arguments) -> Tensor:
    return torch.tensor(numbers(2 * b.total), dtype=b.n.dtype)


def _unique(f: Any, b: Arguments, indices: Tensor) -> tuple[Tensor, ...]:
    spaces = torch.tensor(HASH_SIZES, dtype=b.n.dtype)
    offsets = f.asynchronous_complete_cumsum(b.keys.flatten())
    return f.jagged_unique_indices(spaces, torch.arange(3, dtype=b.n.dtype), offsets, indices)


def _hash_sizes(f: Any, b: Arguments, indices: Tensor) -> tuple[Tensor, ...]:
    offsets = f.asynchronous_complete_cumsum(b.keys.flatten())
    return f.jagged_hash_size_cumsum(offsets, indices, b.n.shape[0])


INTEGER: dict[str, IntegerCase] = {
    "asynchronous_complete_cumsum": IntegerCase(
        lambda f, b, _: f.asynchronous_complete_cumsum(b.n), lambda b: [sums(b.lengths)]
    ),
    "asynchronous_batched_complete_cumsum": IntegerCase(
        lambda f, b, _: f.asynchronous_batched_complete_cumsum(b.keys), lambda b: [[sums(k) for k in keys_of(b)]]
    ),
    "asynchronous_inclusive_cumsum": IntegerCase(
        lambda f, b, _: f.asynchronous_inclusive_cumsum(b.keys).flatten(),
        lambda b: [sums(b.lengths + b.lengths[::-1])[1:]],
    ),
    "asynchronous_exclusive_cumsum": IntegerCase(
        lambda f, b, _: f.asynchronous_exclusive_cumsum(b.keys).flatten(),
        lambda b: [sums(b.lengths + b.lengths[::-1])[:-1]],
    ),
    "offsets_range": IntegerCase(
        lambda f, b, _: f.offsets_range(b.offsets, b.total), lambda b: [[i for n in b.lengths for i in range(n)]]
    ),
    "offsets_range, starts": IntegerCase(
        lambda f, b, _: f.offsets_range(b.offsets[:-1], b.total), lambda b: [[i for n in b.lengths for i in range(n)]]
    ),
    "repeat_arange": IntegerCase(
        lambda f, b, _: f.repeat_arange(b.n), lambda b: [[i for n in b.lengths for i in range(n)]]
    ),
    "get_source_mask": IntegerCase(
        lambda f, b, _: f.get_source_mask(b.n, b.n.flip(0), 2 * b.total),
        lambda b: [[t for n, m in zip(*keys_of(b), strict=True) for t in [True] * n + [False] * m]],
    ),
    "expand_into_jagged_permute": IntegerCase(lambda f, b, _: _expand(f, b), lambda b: [expanded(b)], some=True),
    "jagged_unique_indices": IntegerCase(_unique, unique, oracle=False),
    "jagged_hash_size_cumsum": IntegerCase(_hash_sizes, hash_sizes, oracle=False),
}
