"""Rule and record of the backend ``segments``."""

from __future__ import annotations

from typing import Any

from flexjag.algebra import scores as s
from flexjag.algebra.normalizers import Pointwise, Softmax, StickBreaking
from flexjag.backends.base import Backend, Case, Pair, Promises
from flexjag.backends.segments.cost import cost, wasteful


def refuse(case: Case) -> str | None:
    """The reason why it cannot run a case, or None. Other normalizers than a softmax use no SDPA and take any score."""
    if isinstance(case.normalizer, Softmax) and not s.is_additive(case.score):
        return f"scaled_dot_product_attention only adds a bias, and {case.score!r} is more than that"
    return None


def _run(q: Any, k: Any, v: Any, recipe: Any, scale: float, need_rest: bool) -> Pair:
    if isinstance(recipe.normalizer, Softmax):
        from flexjag.backends.segments.run import run
    else:
        from flexjag.backends.normalized.run import run_segments as run
    return run(q, k, v, recipe, scale, need_rest)


SEGMENTS = Backend(
    name="segments",
    title="SDPA, or dense products, per segment or run of queries",
    takes="any mask, additive scores (any with other normalizers)",
    run=_run,
    refuse=refuse,
    promises=Promises(
        untraceable="it loops over segments on the host, which cannot be traced",
        contains_nan=True,
        wide=(Pointwise, StickBreaking),
    ),
    cost=cost,
    wasteful=wasteful,
)
