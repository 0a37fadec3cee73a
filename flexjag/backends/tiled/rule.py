"""The backend ``tiled``, which runs everything."""

from __future__ import annotations

from typing import Any

from flexjag.algebra.normalizers import Softmax
from flexjag.backends.base import ALL, Backend, Pair, Promises
from flexjag.backends.tiled.cost import cost


def _run(q: Any, k: Any, v: Any, recipe: Any, scale: float, need_rest: bool) -> Pair:
    if isinstance(recipe.normalizer, Softmax):
        from flexjag.backends.tiled.run import run
    else:
        from flexjag.backends.normalized.run import run_tiled as run
    return run(q, k, v, recipe, scale, need_rest)


TILED = Backend(
    name="tiled",
    title="plain torch over the plan's tiles, any device, any dtype",
    takes="any mask, any score",
    run=_run,
    promises=Promises(second_order=True, wide=ALL),
    needs_tiles=True,
    cost=cost,
)
