"""Properties of masks that do not depend on a batch: windows, causality, expected numbers of keys."""

from __future__ import annotations

from torch import Tensor

from flexjag.algebra import masks as m
from flexjag.algebra.dispatch import Interpretation
from flexjag.errors import MaskError, explain_values

SlidingWindow = tuple[int | None, int | None, m.Align]

as_window = Interpretation("window", m.Mask, otherwise=lambda mask: None)
"""``as_window(mask)``: the mask as one sliding window ``(left, right, align)`` of ints, or None if it is not one."""


@as_window.register(m.Full)
def _(mask: m.Full) -> SlidingWindow:
    return None, None, "start"


@as_window.register(m.Causal)
def _(mask: m.Causal) -> SlidingWindow:
    return None, 0, mask.align


@as_window.register(m.Window)
def _(mask: m.Window) -> SlidingWindow | None:
    left, right = mask.left, mask.right
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return None
    if min(0 if x is None else x for x in (left, right)) < 0:
        return None  # kernels take a negative bound for an unlimited one
    return left, right, mask.align


@as_window.register(m.And)
def _(mask: m.And) -> SlidingWindow | None:
    a, b = as_window(mask.left), as_window(mask.right)
    if a is None or b is None:
        return None
    if a[:2] == (None, None) or b[:2] == (None, None):
        return b if a[:2] == (None, None) else a
    if a[2] != b[2]:
        return None
    return _least(a[0], b[0]), _least(a[1], b[1]), a[2]


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


causal_aligns = Interpretation("alignment of the last key", m.Mask, otherwise=lambda mask: set())
"""``causal_aligns(mask) -> set``: alignments of the parts without later keys; empty if later keys may be allowed."""


@causal_aligns.register(m.Causal)
def _(mask: m.Causal) -> set[m.Align]:
    return {mask.align}


@causal_aligns.register(m.Window)
def _(mask: m.Window) -> set[m.Align]:
    return {mask.align} if isinstance(mask.right, int) and mask.right <= 0 else set()


@causal_aligns.register(m.And)
def _(mask: m.And) -> set[m.Align]:
    return causal_aligns(mask.left) | causal_aligns(mask.right)


@causal_aligns.register(m.Or)
def _(mask: m.Or) -> set[m.Align]:
    return _united([causal_aligns(mask.left), causal_aligns(mask.right)])


@causal_aligns.register(m.PerHead)
def _(mask: m.PerHead) -> set[m.Align]:
    return _united([causal_aligns(one) for one in mask.masks])


def _united(parts: list[set[m.Align]]) -> set[m.Align]:
    united: set[m.Align] = set()
    for part in parts:
        united |= part
    return united if all(parts) else set()


def diagonal_align(mask: m.Mask, is_self: bool) -> m.Align:
    """Which key a query of a causal-type mask lines up with: counted from the segment's start, or from its end.

    Raises:
        MaskError: If the mask may allow later keys, or, in cross-attention, lines up both ways.
    """
    found = causal_aligns(mask)
    if not found:
        rule = "stick-breaking needs a mask without later keys: Causal(), Window(w, 0) or one of them & any mask"
        raise MaskError(explain_values("mask", rule, mask=mask))
    if len(found) > 1 and not is_self:
        rule = "stick-breaking needs one alignment of queries and keys that differ in offsets"
        raise MaskError(explain_values("mask", rule, mask=mask))
    return "start" if is_self else found.pop()


attended = Interpretation("number of keys", m.Mask, otherwise=lambda mask, keys: keys)
"""``attended(mask, keys)``: expected number of keys that a query may attend, of `keys` in its segment.

>>> attended(m.Window(127, 0) | m.Prefix(4), 1000.0), attended(m.Causal() & m.Prefix(4), 1000.0)
(132.0, 4.0)
"""


@attended.register(m.And)
def _(mask: m.And, keys: float) -> float:
    return min(attended(mask.left, keys), attended(mask.right, keys))


@attended.register(m.Or)
def _(mask: m.Or, keys: float) -> float:
    return min(keys, attended(mask.left, keys) + attended(mask.right, keys))


@attended.register(m.Causal)
def _(mask: m.Causal, keys: float) -> float:
    return keys / 2


@attended.register(m.Window)
def _(mask: m.Window, keys: float) -> float:
    sides = [keys / 2 if x is None or not isinstance(x, int) else float(x) for x in (mask.left, mask.right)]
    return min(keys, max(0.0, sum(sides) + 1))


@attended.register(m.Prefix)
def _(mask: m.Prefix, keys: float) -> float:
    return min(keys, float(mask.n)) if isinstance(mask.n, int) else keys


@attended.register(m.Chunked)
def _(mask: m.Chunked, keys: float) -> float:
    return min(keys, float(mask.size)) if isinstance(mask.size, int) else keys


extent = Interpretation("reach of keys", m.Mask, otherwise=attended)
"""``extent(mask, keys)``: expected distance between the first and the last key that a query may attend.

>>> extent(m.Window(127, 0) | m.Prefix(4), 1000.0), extent(m.Causal() & m.Window(9, 9), 1000.0)
(1000.0, 19.0)
"""


@extent.register(m.And)
def _(mask: m.And, keys: float) -> float:
    return min(extent(mask.left, keys), extent(mask.right, keys))


@extent.register(m.Or)
def _(mask: m.Or, keys: float) -> float:
    return keys
