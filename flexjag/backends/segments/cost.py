"""Cost estimate of the backend ``segments``, and the cases that ``auto`` should not give it."""

from __future__ import annotations

import torch

from flexjag.algebra import masks as m
from flexjag.algebra import scores as s
from flexjag.algebra.facts import as_window, extent
from flexjag.algebra.normalizers import Softmax
from flexjag.algebra.tree import is_by_position
from flexjag.backends.base import ASSUMED_DIMS, Case
from flexjag.backends.costs import Sizes, Work

LONG_LEARNED = 16384  # keys over which a learned bias, a gradient of all keys per call, wastes too much
SHARED = 2**22  # numbers in a bias for all segments, if it depends on the head: 16 MB in float32
SDPA_WINDOWS = ((None, None, "start"), (None, None, "end"), (None, 0, "start"))
"""The masks of ``scaled_dot_product_attention`` without a mask tensor: full, or ``is_causal`` (top-left)."""
ROWS = {
    "segments, runs": 256,
    "segments, shared bias": 256,
    "segments, pointwise": 128,
}  # queries of a call, as the backends cut them


def cost(case: Case) -> Work:
    """Estimated work of a case."""
    sizes = Sizes.of(case.layout, case.dims or ASSUMED_DIMS)
    if not isinstance(case.normalizer, Softmax):
        way = "segments, pointwise"
    elif case.score is None and as_window(case.mask) in SDPA_WINDOWS and case.scale > 0:
        way = "segments, whole"
    elif _shares_bias(case, sizes):
        way = "segments, shared bias"
    else:
        way = "segments, runs"
    return work(way, case.mask, sizes)


def wasteful(case: Case) -> str | None:
    """The reason why ``auto`` should skip it for a case, or None."""
    if case.layout.num_kv <= LONG_LEARNED or case.score is None or not torch.is_grad_enabled():
        return None
    learned = any(t.requires_grad for t in s.tensors(case.score))
    if learned and not _shares_bias(case, Sizes.of(case.layout, case.dims or ASSUMED_DIMS)):
        return "each of its calls would make a gradient of all keys, for the learned bias"
    return None


def work(way: str, mask: m.Mask, sizes: Sizes) -> Work:
    """Estimated numbers of calls and of scores.

    Args:
        way: ``"segments, whole"``, ``"segments, runs"``, ``"segments, shared bias"`` or ``"segments, pointwise"``.
        mask: The mask.
        sizes: Sizes of the batch.
    """
    n, keys = sizes.queries, sizes.keys
    if way == "segments, whole":
        reach = keys if as_window(mask) == (None, None, "start") else keys / 2
        return Work(way, sizes.segments, sizes.tokens, sizes.tokens * reach)
    rows = min(n, ROWS[way])
    calls = sizes.segments * max(1.0, -(-n // ROWS[way]))
    return Work(way, calls, sizes.tokens, sizes.tokens * min(keys, extent(mask, keys) + rows))


def _shares_bias(case: Case, sizes: Sizes) -> bool:
    """True if one bias is evaluated for all segments, as estimated from their mean length."""
    runs = work("segments, runs", case.mask, Sizes(sizes.segments, sizes.num_q, sizes.num_kv, 1.0))
    small = sizes.queries * sizes.keys <= min(2 * runs.scores, SHARED / (case.dims or (1,))[0])
    return small and is_by_position(case.mask, case.score, case.layout.is_self)
