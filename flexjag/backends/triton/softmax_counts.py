"""The number of scores that the softmax kernels compute, counted from a plan's items and spans."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag.backends.triton.softmax_launch import Tile, heights_of, packed_heads, tiles_of
from flexjag.backends.triton.softmax_tables import query_items, spans_of
from flexjag.lowering.recipe import Recipe

LARGEST = 2**31 - 1


def computed_scores(recipe: Recipe, dims: tuple[int, int, int, int], dtype: torch.dtype) -> float:
    """The scores that the forward kernel computes for a head: rows times keys of all steps. Reads the device.

    Args:
        recipe: The plan.
        dims: ``(H, G, D, E)``.
        dtype: Of q, k and v.
    """
    if recipe.layout.num_q == 0:
        return 0.0
    heads, groups, width = dims[0], dims[1], max(dims[2:])
    pack, spans = packed_heads(heads // groups, recipe.head_of is not None), spans_of(recipe)
    of_mask = recipe.head_of
    share = (spans.new_ones(1) if of_mask is None else of_mask.bincount(minlength=spans.shape[0])).cpu()
    total = 0.0
    heights = heights_of("forward", dtype, width, pack)
    for tile, height, items in zip(
        tiles_of("forward", dtype, width), heights, query_items(recipe, heights), strict=True
    ):
        by_mask = torch.stack([_scores(one, items, tile, height) for one in spans])
        total += float((by_mask.cpu() * share / share.sum()).sum())
    return total


def _scores(spans: Tensor, items: Tensor, tile: Tile, height: int) -> Tensor:
    """The scores of a list of items, as the kernels' ``steps_in`` divides their keys into steps."""
    first, end = items.long()
    i = first[:, None] + torch.arange(height, device=items.device)
    inside = i < end[:, None]
    bounds = spans[:, :, i.clamp(max=spans.shape[2] - 1)]  # [kinds, K, items, height]
    lo, hi = bounds[0], bounds[1]
    sure_lo, sure_hi = (lo, hi) if spans.shape[0] == 2 else (torch.maximum(lo, bounds[2]), torch.minimum(hi, bounds[3]))
    some = inside & (hi > lo)
    stop = torch.where(some, hi, 0).amax(2)
    start = torch.minimum(torch.where(some, lo, LARGEST).amin(2), stop)
    sure_start = torch.minimum(torch.maximum(torch.where(inside, sure_lo, 0).amax(2), start), stop)
    sure_stop = torch.where(inside, sure_hi, LARGEST).amin(2)
    before = (sure_start - start + tile.step - 1) // tile.step
    begin = start + before * tile.step
    many = (torch.minimum(sure_stop, stop) - begin).clamp(min=0) // tile.wide
    after = (stop - begin - many * tile.wide + tile.step - 1).clamp(min=0) // tile.step
    return ((before + after) * tile.step + many * tile.wide).sum() * height
