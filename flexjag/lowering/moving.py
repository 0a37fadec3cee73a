"""Recipes on another device: what a plan holds is moved, and what GPU kernels want in another form is made anew."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from flexjag.algebra import masks as m
from flexjag.algebra import tree
from flexjag.algebra import user_functions as functions
from flexjag.lowering import mods
from flexjag.lowering.layout import runs_on_gpu
from flexjag.lowering.outline import mark_sizes, with_tiles
from flexjag.lowering.recipe import Notes, Recipe, check_reading, place_in
from flexjag.moving import Change, Movable

R = TypeVar("R", bound=Recipe)


def moved(recipe: R, change: Change) -> R:
    """The recipe with `change` of every tensor in it, those in functions' closures included.

    Tiles are made before, if they were not: a device would have to be waited for. Derived values that backends cached
    stay behind.

    Args:
        recipe: The recipe.
        change: Moves a tensor; keeps shapes and dtypes, and returns the same tensor for the same one.

    Raises:
        PlanError: If the mask's functions read something else than when the recipe was made, as its tiles tell.
    """
    check_reading(recipe)
    recipe = with_tiles(recipe)
    layout = _each(recipe.layout, change)
    layout = replace(layout, on_gpu=runs_on_gpu(layout.device))
    if layout.on_gpu == recipe.layout.on_gpu:
        tables = _each(recipe.tables, change)
    else:
        tables = mods.row_tables(layout, recipe.block_size)
    names = ("mask", "score", "normalizer", "sandwiches", "head_of", "made_tiles")
    parts = {name: _each(getattr(recipe, name), change) for name in names}
    reading = functions.Reading([], [])
    if not torch.compiler.is_compiling() and any(isinstance(x, m.MaskMod) for x in tree.walk(parts["mask"])):
        place = place_in(layout, tables)
        functions.check_functions(parts["mask"], place)
        reading = functions.Reading.of(parts["mask"], lambda: place)
    made = replace(
        recipe,
        **parts,
        layout=layout,
        tables=tables,
        kernel_masks=tuple(mods.kernel_mask(x, tables) for x in parts["sandwiches"]),
        kernel_score=mods.kernel_score(parts["score"], tables, layout),
        reading=reading,
        notes=Notes(),
        own_notes=Notes(),
    )
    mark_sizes(made)
    return made


def _each(value: Any, change: Change) -> Any:
    """`change` of all tensors in nodes, tuples and dataclasses of them."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Movable):
        return value.changed(change)
    if isinstance(value, tuple):
        return tuple([_each(x, change) for x in value])
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{x.name: _each(getattr(value, x.name), change) for x in fields(value)})
    return value
