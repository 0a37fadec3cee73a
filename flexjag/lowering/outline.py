"""Lowering of nodes to a recipe: layout, spans, tables and kernel masks, then the tiles."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from flexjag.algebra import masks as m
from flexjag.algebra import scores as s
from flexjag.algebra import tree
from flexjag.algebra import user_functions as functions
from flexjag.algebra.facts import as_window
from flexjag.algebra.normalizers import Normalizer, Softmax
from flexjag.errors import MaskError, PlanError, assert_on_device
from flexjag.jagged import Jagged
from flexjag.lowering import mods
from flexjag.lowering.later import Later
from flexjag.lowering.layout import Layout, blocks, build_layout
from flexjag.lowering.recipe import (
    Notes,
    Recipe,
    check_arguments,
    check_fit,
    check_normalizer,
    check_score,
    of_this_batch,
    place_in,
)
from flexjag.lowering.spans import Sandwich, Spans, sandwich
from flexjag.lowering.tiles import TileList, Tiles, build_tables, list_tiles, refine
from flexjag.offsets import mark_varying
from flexjag.upstream import holds_no_numbers

R = TypeVar("R", bound=Recipe)
TILES = "tiles"
"""Key of the tiles in a recipe's notes, if they were made after it."""

REFINE_LIMIT = 2**26  # predicate evaluations that refining may cost when nobody asked for it


def _head_masks(mask: m.Mask) -> tuple[list[m.Mask], list[int] | None]:
    """The distinct masks of the heads, and each head's index into them; None for the latter if one serves all heads."""
    heads = m.num_mask_heads(mask)
    if heads is None or not any(isinstance(one, m.PerHead) for one in tree.walk(mask)):
        return [mask], None
    distinct: list[m.Mask] = []
    head_of: list[int] = []
    for h in range(heads):
        one = m.at_head(mask, h)
        known = [i for i, seen in enumerate(distinct) if seen == one]  # Dynamo cannot trace distinct.index(one)
        head_of.append(known[0] if known else len(distinct))
        if not known:
            distinct.append(one)
    return distinct, head_of


def _capacity(layout: Layout, block: int, max_length: int | None, traced: bool) -> tuple[int | None, int | None]:
    """Upper bounds on the tiles of a row or column and on all tiles, from `max_length`; None without a bound.

    In self-attention the keys of a tile row are one range: its own tokens and at most a segment to either side.
    In cross-attention it may meet many segments with separate key ranges, so only the grid bounds it.
    """
    if max_length is None:
        return None, None
    rows, cols = blocks(layout.num_q, block), blocks(layout.num_kv, block)
    width = (2 * max_length + block - 1) // block + 2 if layout.is_self else None
    if traced:  # as in `row_count`, no maximum and no minimum: twice the harmonic mean is at least the lesser of both
        return width, (rows + 1) * (cols if width is None else 2 * width * cols // (width + cols) + 1)
    width = max(rows, cols) if width is None else width
    return width, max(2, rows * min(width, cols))


class Bounds(NamedTuple):
    """Tile size, bounds, and `validate` to check the offsets' contents; the arguments of :func:`flexjag.plan`."""

    block_size: int = 128
    max_tokens: int | None = None
    max_length: int | None = None
    validate: bool = False


class OneCall(Later, Recipe):
    """A recipe for one eager call: what it has per row is made when it is first read, if its mask is a window.

    Some backends never read it. A plan, which many layers share, has it from the start.
    """

    later = ("sandwiches", "tables", "kernel_masks")

    @property
    def exact(self) -> bool:
        """True if every head's mask equals its spans, as a window does."""
        return "sandwiches" not in vars(self) or super().exact

    def make(self) -> dict[str, Any]:
        """Spans and tables, by name."""
        return _parts(self.mask, None, self.layout, mods.row_tables(self.layout, self.block_size))


def _can_wait(mask: object, score: s.Score | None, bounds: Bounds) -> bool:
    """True if nothing has to be known of each row to check the arguments, and the mask is one for all heads."""
    bounded = bounds.max_tokens is not None or bounds.max_length is not None
    return score is None and not bounded and isinstance(mask, m.Mask) and as_window(mask) is not None


def outline(
    kind: type[R],
    q: Jagged,
    k: Jagged | None,
    mask: m.Mask | None,
    score: s.Score | None,
    normalizer: Normalizer | None,
    bounds: Bounds = Bounds(),  # noqa: B008, immutable
) -> R:
    """Lower everything but the tiles, in time linear in the tokens.

    Args:
        kind: Class of the result: :class:`Recipe` or a subclass of it. :class:`OneCall`, not in a graph, leaves out
            what can wait.
        q: Query batch, as in :func:`flexjag.plan`; so the others.
        k: Key batch; None for self-attention.
        mask: The mask.
        score: The score.
        normalizer: The normalizer.
        bounds: Tile size and bounds.
    """
    block_size, max_tokens, max_length, validate = bounds
    mask = m.Full() if mask is None else mask
    normalizer = Softmax() if normalizer is None else normalizer
    heads = check_arguments(mask, score, normalizer, block_size, max_length)
    later = issubclass(kind, Later) and _can_wait(mask, score, bounds)
    layout = build_layout(
        q, q if k is None else k, max_tokens=max_tokens, max_length=max_length, validate=validate, later=later
    )
    if max_length is not None:
        for offsets in (layout.q_offsets, layout.kv_offsets):
            assert_on_device((offsets.diff() <= max_length).all(), "max_length: must bound every segment's length")
    check_normalizer(layout, mask, normalizer)
    check_fit(PlanError, normalizer, layout)
    sample = None
    if q.values.ndim == 3 and q.values.dtype.is_floating_point:
        grad = q.values.requires_grad and torch.is_grad_enabled()
        sample = (q.values.shape[1], q.values.shape[2], q.values.dtype, grad)
    reading, parts = functions.Reading([], []), {"head_of": None, "kernel_score": None}
    if not later:
        check_fit(MaskError, mask, layout)
        tables = mods.row_tables(layout, block_size)
        check_score(score, layout, tables)
        score = of_this_batch(score)
        if not torch.compiler.is_compiling():
            mask = functions.frozen(mask, torch.clone)
            if any(isinstance(x, m.MaskMod) for x in tree.walk(mask)):
                place = place_in(layout, tables)
                functions.check_functions(mask, place)
                reading = functions.Reading.of(mask, lambda: place)
        parts = _parts(mask, score, layout, tables)
    known: dict[str, Any] = {
        "layout": layout,
        "mask": mask,
        "score": score,
        "normalizer": normalizer,
        "heads": heads,
        "block_size": block_size,
        "made_tiles": None,
        "max_length": max_length,
        "reading": reading,
        "notes": Notes(),
        "own_notes": Notes(),
        "sample": sample,
        **parts,
    }
    return kind.without(**known) if later and issubclass(kind, Later) else kind(**known)


def _parts(mask: m.Mask, score: s.Score | None, layout: Layout, tables: mods.RowTables) -> dict[str, Any]:
    """What a recipe's mask and score become, by its attributes' names."""
    head_masks, head_of = _head_masks(mask)
    entries = None
    if head_of is not None:  # filled on the device: uploading a list would wait for it
        entries = torch.stack([torch.full((), i, dtype=torch.int32, device=layout.device) for i in head_of])
    sandwiches = tuple(sandwich(one, layout) for one in head_masks)
    return {
        "sandwiches": sandwiches,
        "head_of": entries,
        "tables": tables,
        "kernel_masks": tuple(mods.kernel_mask(x, tables) for x in sandwiches),
        "kernel_score": mods.kernel_score(score, tables, layout),
    }


def with_tiles(recipe: R, refine_tiles: bool | None = None) -> R:
    """Add the tiles to an outlined recipe; `refine_tiles` as in :func:`flexjag.plan`.

    Outside of graphs they are made once for all recipes that share its notes.
    """
    if recipe.made_tiles is not None:
        return recipe
    if holds_no_numbers(recipe.layout.q_offsets):
        return replace(recipe, made_tiles=_tiles(recipe, refine_tiles))
    if TILES not in recipe.notes:
        recipe.notes[TILES] = _tiles(recipe, refine_tiles)
    made = replace(recipe, made_tiles=recipe.notes[TILES])
    mark_sizes(made)
    return made


def _tiles(recipe: Recipe, refine_tiles: bool | None) -> Tiles:
    layout, block, sandwiches, max_length = recipe.layout, recipe.block_size, recipe.sandwiches, recipe.max_length
    traced = holds_no_numbers(layout.q_offsets)
    width, size = _capacity(layout, block, max_length, traced)
    lists = [list_tiles(x.outer, x.inner, layout.num_kv, block, size) for x in sandwiches]
    if size is None and not traced:
        tables = recipe.tables
        lists = [_refined(t, x, tables, layout, block, refine_tiles) for t, x in zip(lists, sandwiches, strict=True)]
    union, by_head = lists[0], lists
    if recipe.head_of is not None:
        by_head = [lists[i] for i in _head_masks(recipe.mask)[1] or ()]
    if len(lists) > 1:
        lo, hi = (torch.cat([getattr(x.outer, end) for x in sandwiches]) for end in ("lo", "hi"))
        nothing = Spans(layout.kv_start[None], layout.kv_start[None])
        union = list_tiles(Spans(lo, hi), nothing, layout.num_kv, block, size)
    return Tiles(union, *build_tables(by_head, layout.num_q, layout.num_kv, block, width))


def for_gpu(recipe: R) -> R:
    """Rebuild a recipe as if made on a GPU, with tiles, to be sent to a process that compiles GPU kernels."""
    recipe = with_tiles(recipe)
    layout = replace(recipe.layout, on_gpu=True)
    tables = mods.row_tables(layout, recipe.block_size)
    masks = tuple(mods.kernel_mask(x, tables) for x in recipe.sandwiches)
    score = mods.kernel_score(recipe.score, tables, layout)
    nothing = functions.Reading([], [])  # what functions read is compared here, not in another process
    made = replace(recipe, layout=layout, tables=tables, kernel_masks=masks, kernel_score=score, reading=nothing)
    mark_sizes(made)
    return made


def mark_sizes(recipe: Recipe) -> None:
    """Mark the sizes of the recipe's tensors that vary from batch to batch as dynamic, if TorchDynamo is in use."""
    if torch.compiler.is_compiling() or "torch._dynamo" not in sys.modules:
        return
    _mark(recipe.layout, 0)
    _mark(recipe.tables, 0)
    tiles = recipe.made_tiles
    if tiles is not None:
        _mark(tiles.all_heads, 0)
        for table in (tiles.kv_partial, tiles.kv_full, tiles.q_partial, tiles.q_full):
            mark_varying(table.count, 2)
            mark_varying(table.index, 2, 3)
    for x in recipe.sandwiches:
        _mark(x.outer, 1)
        _mark(x.inner, 1)
    for x in (recipe.mask, *recipe.kernel_masks, recipe.score, recipe.kernel_score):
        tree.mark(x)


def _mark(holder: object, dim: int) -> None:
    for value in vars(holder).values():
        if isinstance(value, Tensor):
            mark_varying(value, dim)


def _refined(
    tiles: TileList, x: Sandwich, tables: mods.RowTables, layout: Layout, block: int, wanted: bool | None
) -> TileList:
    if x.exact or wanted is False or not layout.num_q or not layout.num_kv:
        return tiles
    if wanted is None and tiles.row.shape[0] * block**2 > REFINE_LIMIT:
        return tiles
    test = mods.mask_mod((mods.kernel_mask(x, tables),), None, tables, layout)
    if place_in(layout, tables) is None or mods.reads_head(test, tables):
        return tiles  # one list of tiles has to do for all heads
    zero = torch.zeros((), dtype=torch.int32, device=layout.device)
    return refine(tiles, lambda q, kv: test(zero, zero, q, kv), layout.num_q, layout.num_kv, block)
