"""What the softmax kernels read of a plan besides its functions: the spans of its masks, and lists of items.

An item is a run of tokens of one segment that one program has. The height of a segment's items, in tokens, is at most
an eighth of its length, so that little of a tile is beyond a diagonal or behind the segment's end; it depends on
nothing but that length. The items of each height are a list of their own, for a launch of their own. The lists are made
on the device, with a length that follows from the numbers of tokens and segments: the host waits for nothing, and a
plan of fixed capacity has lists of fixed length. Entries that a list does not need are empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexjag.backends.printed import savable
from flexjag.lowering.recipe import Recipe
from flexjag.lowering.spans import Spans

SHARE = 8
"""A segment has at least so many items of a height, unless that is the least height."""


def spans_of(recipe: Recipe) -> Tensor:
    """The spans of the plan's distinct masks, ``[masks, kinds, K, T_q]`` int32.

    The kinds are the starts and the ends of the outer spans and, unless the masks equal their spans, of the inner ones.
    """
    key = "spans of the softmax kernels"
    if torch.compiler.is_compiling():
        return _stacked(recipe)
    if key not in recipe.notes:
        recipe.notes[key] = _stacked(recipe)
    return savable([recipe.notes[key]])[0]


def _stacked(recipe: Recipe) -> Tensor:
    pairs = [(x.outer,) if recipe.exact else (x.outer, x.inner) for x in recipe.sandwiches]
    most = max(spans.count for some in pairs for spans in some)
    return torch.stack([torch.stack([x for spans in some for x in _widened(spans, most)]) for some in pairs])


def _widened(spans: Spans, count: int) -> tuple[Tensor, Tensor]:
    """Starts and ends of so many spans; the additional ones are empty."""
    lack = (0, 0, 0, count - spans.count)
    lo, hi = (torch.nn.functional.pad(x, lack) if lack[3] else x for x in (spans.lo, spans.hi))
    return lo, hi


def query_items(recipe: Recipe, heights: Sequence[int]) -> list[Tensor]:
    """For each height, the first token of each item and the end of its segment, ``[2, items]`` int32."""
    return _lists(recipe, "queries", heights)


def key_items(recipe: Recipe, heights: Sequence[int]) -> list[Tensor]:
    """For each height, the first key of each item, the end of its segment, and start and end of the segment's queries.

    Each is ``[4, items]`` int32.
    """
    return _lists(recipe, "keys", heights)


def _lists(recipe: Recipe, side: str, heights: Sequence[int]) -> list[Tensor]:
    key = "items", side, tuple(heights)
    if torch.compiler.is_compiling():
        return _listed(recipe, side, heights)
    if key not in recipe.notes:
        recipe.notes[key] = _listed(recipe, side, heights)
    return savable(recipe.notes[key])


def _listed(recipe: Recipe, side: str, heights: Sequence[int]) -> list[Tensor]:
    layout = recipe.layout
    if side == "queries":
        given, tokens = [layout.q_offsets], layout.num_q
    else:
        given, tokens = [layout.kv_offsets, layout.q_offsets], layout.num_kv
    return list_items(given, tokens, heights, recipe.max_length)


def list_items(
    offsets: Sequence[Tensor], tokens: int, heights: Sequence[int], max_length: int | None = None
) -> list[Tensor]:
    """The items of each height.

    Args:
        offsets: ``[S+1]`` int32, whose segments are divided into items; then others of the same number of segments.
        tokens: Number of packed tokens of the first.
        heights: Heights in tokens, ascending.
        max_length: Bound on the lengths, in tokens, or None. Heights that no segment can have get an empty list.

    Returns:
        For each height ``[2 · len(offsets), items]`` int32: of each item its first token and the end of its segment,
        then start and end of the segment in the other offsets. All are 0 for an unused item.
    """
    zero = offsets[0].new_zeros(1)
    begin = torch.cat([offsets[0][:-1], zero])  # with an entry for items that are not used
    lengths = torch.cat([offsets[0].diff(), zero])
    ends = [torch.cat([x[1:], zero]) for x in offsets]
    begins = [torch.cat([x[:-1], zero]) for x in offsets]
    found = []
    for at, height in enumerate(heights):
        low = SHARE * height if at else 0
        high = SHARE * heights[at + 1] if at + 1 < len(heights) else None
        if max_length is not None and max_length < low:
            found.append(offsets[0].new_zeros(2 * len(offsets), 0))
            continue
        fits = lengths >= low if high is None else (lengths >= low) & (lengths < high)
        counts = torch.where(fits, (lengths + (height - 1)) // height, 0)
        past = counts.cumsum(0, dtype=torch.int32)
        # The last item of a segment may be partly empty. Two more, so that no size is 0 or 1, which graphs depend on.
        most = tokens // height + 2 + (offsets[0].shape[0] if at == 0 else tokens // low)
        item = torch.arange(most, device=zero.device, dtype=torch.int32)
        segment = torch.searchsorted(past, item, right=True).clamp(max=lengths.shape[0] - 1)
        is_used = item < past[-1]
        first = begin[segment] + (item - (past - counts)[segment]) * height
        rows = [first, ends[0][segment]]
        rows += [x[segment] for pair in zip(begins[1:], ends[1:], strict=True) for x in pair]
        found.append(torch.stack([torch.where(is_used, x, 0) for x in rows]))
    return found
