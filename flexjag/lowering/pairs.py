"""What is given for each (query, key) pair: matrices of all segments back to back, or one that segments share."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag.algebra import scores as s
from flexjag.algebra.dispatch import Interpretation
from flexjag.algebra.node import along, node
from flexjag.algebra.tree import rebuilt
from flexjag.errors import ScoreError, assert_on_device, explain_values
from flexjag.lowering.layout import INT32_MAX, Layout
from flexjag.offsets import can_look, is_empty


def first_pairs(layout: Layout, entries: int, error: type[ValueError]) -> Tensor:
    """The place of each query row's first pair in row-major matrices of all segments back to back, ``[T_q]``.

    Rows without a pair have any place. It is int32 if all places are, as a GPU takes two instructions for each
    operation on 64 bits.

    Args:
        layout: The layout.
        entries: Number of entries, checked where the offsets may be read; else this is an assertion on the device.
        error: What to raise.

    Raises:
        error: If there are not as many entries as pairs; behind those, batches of fixed capacity may have more.
    """
    areas = _lengths(layout.q_offsets).long() * _lengths(layout.kv_offsets)
    rule = f"packed matrices must have sum(n_s * m_s) entries{', or more of fixed capacity' * layout.has_spare}"
    if can_look(areas):
        needed = int(areas.sum())
        if entries < needed or (entries > needed and not layout.has_spare):
            raise error(explain_values("values", rule, entries=entries, needed=needed))
    elif areas.device.type != "meta":
        needed = areas.sum()
        assert_on_device(needed <= entries if layout.has_spare else needed == entries, f"values: {rule}")
    segment = layout.q_segment.clamp(max=layout.num_segments)  # spare rows are of a segment behind the last
    first = areas.cumsum(0)[segment] + layout.q_pos.long() * layout.kv_length()
    first = first.clamp(max=entries - 1).clamp(min=0)
    return first.int() if entries <= INT32_MAX else first


def _lengths(offsets: Tensor) -> Tensor:
    """0, and the lengths of the segments: ``[S+1]``, as a slice of size S would make S = 1 a separate graph."""
    return offsets.diff(prepend=offsets[:1])


@node
class BiasRows(s.Score):
    """A packed :class:`~flexjag.algebra.scores.DenseBias`; a row's key of local position j is at ``first + j``."""

    additive = printable = True

    values: Tensor = along("pair", per_head=True)
    first: Tensor = along("query token")

    def __post_init__(self) -> None:
        """Nothing: lowering makes it, and marks it only with a plan that is kept."""


by_row = Interpretation(
    "score by row", s.Score, otherwise=lambda score, layout: rebuilt(score, lambda one: by_row(one, layout))
)
"""``by_row(score, layout) -> score``: scores that hold something for each pair, with the place of each row's first."""


@by_row.register(s.DenseBias)
def _(score: s.DenseBias, layout: Layout) -> s.Score:
    values, first = score.values, None
    if score.is_packed:
        first = first_pairs(layout, values.shape[1], ScoreError)
    else:
        _check_longest(values, layout)
    # Kernels read the given tensor, so that gradients reach it. An empty one gets an entry that no pair has.
    if is_empty(values.shape[1]) or is_empty(values.shape[-1]):
        values = torch.nn.functional.pad(values, (0, 1) * (values.ndim - 1))
    return s.DenseBias(values) if first is None else BiasRows(values, first)


def _check_longest(values: Tensor, layout: Layout) -> None:
    """Check that matrices which segments share are at least as large as the longest segment."""
    longest = [_lengths(x).amax() for x in (layout.q_offsets, layout.kv_offsets)]
    rule = "must have a row for each query and a column for each key of the longest segment"
    rows, columns = values.shape[1:]
    if can_look(*longest):
        queries, keys = (int(n) for n in longest)
        if rows < queries or columns < keys:
            seen = {"shape": tuple(values.shape), "queries": queries, "keys": keys}
            raise ScoreError(explain_values("values", rule, **seen))
    elif layout.device.type != "meta":
        assert_on_device((longest[0] <= rows) & (longest[1] <= columns), f"values: {rule}")
