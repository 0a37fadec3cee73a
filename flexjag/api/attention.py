"""attention(): check the inputs, choose a backend, run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from flexjag.algebra import normalizers
from flexjag.algebra import user_functions as functions
from flexjag.algebra.masks import Mask
from flexjag.algebra.normalizers import Normalizer, Softmax, StickBreaking
from flexjag.algebra.scores import Score
from flexjag.algebra.tree import replaced, tensors_along
from flexjag.api.dropout import Dropping, dropping, rescaled
from flexjag.api.options import checked_scale, checked_sinks, in_one_dtype, with_sinks
from flexjag.api.plan import Plan
from flexjag.backends.base import Backend, Case, Pair
from flexjag.backends.choose import BACKENDS, pick
from flexjag.differentiation import needs_plain_operations
from flexjag.errors import BuildError, PlanError, ShapeError, assert_on_device, explain_values
from flexjag.jagged import Jagged
from flexjag.lowering.outline import Bounds, OneCall, outline, with_tiles
from flexjag.lowering.recipe import Recipe, check_reading
from flexjag.offsets import check_computable, check_same_layout, is_empty, same_size
from flexjag.upstream import holds_no_numbers


@overload
def attention(
    q: Jagged,
    k: Jagged,
    v: Jagged,
    *,
    mask: Mask | None = None,
    score: Score | None = None,
    normalizer: Normalizer | None = None,
    plan: Plan | None = None,
    scale: float | None = None,
    sinks: Tensor | float | None = None,
    dropout: float = 0.0,
    dropout_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_lse: Literal[False] = False,
    return_remainder: Literal[False] = False,
    backend: str = "auto",
    validate: bool = False,
) -> Jagged: ...
@overload
def attention(
    q: Jagged,
    k: Jagged,
    v: Jagged,
    *,
    mask: Mask | None = None,
    score: Score | None = None,
    normalizer: Normalizer | None = None,
    plan: Plan | None = None,
    scale: float | None = None,
    sinks: Tensor | float | None = None,
    dropout: float = 0.0,
    dropout_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_lse: Literal[True],
    return_remainder: Literal[False] = False,
    backend: str = "auto",
    validate: bool = False,
) -> tuple[Jagged, Jagged]: ...
@overload
def attention(
    q: Jagged,
    k: Jagged,
    v: Jagged,
    *,
    mask: Mask | None = None,
    score: Score | None = None,
    normalizer: Normalizer | None = None,
    plan: Plan | None = None,
    scale: float | None = None,
    sinks: Tensor | float | None = None,
    dropout: float = 0.0,
    dropout_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_lse: Literal[False] = False,
    return_remainder: Literal[True],
    backend: str = "auto",
    validate: bool = False,
) -> tuple[Jagged, Jagged]: ...
@overload
def attention(
    q: Jagged,
    k: Jagged,
    v: Jagged,
    *,
    mask: Mask | None = None,
    score: Score | None = None,
    normalizer: Normalizer | None = None,
    plan: Plan | None = None,
    scale: float | None = None,
    sinks: Tensor | float | None = None,
    dropout: float = 0.0,
    dropout_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    return_remainder: bool = False,
    backend: str = "auto",
    validate: bool = False,
) -> Jagged | tuple[Jagged, Jagged]: ...
def attention(
    q: Jagged,
    k: Jagged,
    v: Jagged,
    *,
    mask: Mask | None = None,
    score: Score | None = None,
    normalizer: Normalizer | None = None,
    plan: Plan | None = None,
    scale: float | None = None,
    sinks: Tensor | float | None = None,
    dropout: float = 0.0,
    dropout_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    return_remainder: bool = False,
    backend: str = "auto",
    validate: bool = False,
) -> Jagged | tuple[Jagged, Jagged]:
    """Attention within each segment of a jagged batch.

    Tokens never see another segment; that is not an option. Differentiable in q, k, v and the score's tensors,
    except where a backend says otherwise. Works inside ``torch.compile(fullgraph=True)``. Computes in the dtype of q,
    k and v; under autocast, they are first cast to its dtype if theirs differ.

    Args:
        q: Queries, values ``[T_q, H, D]``.
        k: Keys, values ``[T_kv, G, D]``, ``H % G == 0``; query head h uses key head ``h // (H / G)``.
        v: Values, ``[T_kv, G, E]``, with k's offsets.
        mask: Predicate of the keys of its own segment that a query attends. Default: all.
        score: Function applied to ``scale * q·k`` before the normalizer. Default: identity.
        normalizer: Default :class:`~flexjag.algebra.normalizers.Softmax`.
        plan: A plan made before for this layout, instead of `mask`, `score` and `normalizer`. Make one per batch and
            share it between layers.
        scale: Factor on ``q·k``. Default ``1 / sqrt(D)``.
        sinks: Attention sinks: for each query head ``[H]`` the logit of one more key, which every row attends and whose
            value is zero, so that a row's weights may sum to less than 1. A floating-point tensor, which may need
            gradients, or one number for all heads: 0.0 adds one to the denominator. Only for a softmax (Xiao et al.,
            2023; GPT-OSS).
        dropout: The share of weights to drop, 0 <= p < 1; the others are divided by 1 - p. Which ones is a hash of a
            seed, the segment's number, the query head, and the positions of query and key in the segment: the same
            with every backend, however the batch is packed or padded. Of a softmax or a pointwise normalizer. Pass 0.0
            when not training.
        dropout_ids: ``[S]`` integers, the number of each segment for `dropout`; default its index. With those of the
            samples in a data set, a sample's weights are dropped alike wherever it is in a batch.
        generator: Draws the seed, one number for each call with dropout. Default: torch's of q's device.
        return_lse: Also return the natural-log sum of exponentials of each row's scores, its sink's and dropped ones
            included, for :func:`~flexjag.api.merge.merge`. Only a softmax has one.
        return_remainder: Also return the unassigned rest of each row's stick. Only a stick-breaking normalizer has one.
        backend: ``"auto"``, ``"reference"``, ``"tiled"``, ``"segments"``, ``"cpp"``, ``"flex"``, ``"varlen"``,
            ``"triton"``, or one of your own (:func:`flexjag.extend.register`). A named backend that cannot run the
            plan raises; it never falls back.
        validate: Check the contents of the offsets (one device sync; in a traced graph an assertion). Outside of
            graphs, those on a CPU are always checked.

    Returns:
        Values ``[T_q, H, E]`` on q's offsets; with `return_lse` also the log-sum-exp ``[T_q, H]``, with
        `return_remainder` also the remainder ``[T_q, H]``, 0 to 1. A row without an allowed key gets output 0,
        log-sum-exp -inf or its sink, remainder 1 and no gradient.

    Raises:
        ShapeError: If shapes, dtypes or devices do not fit.
        LayoutError: If the offsets do not fit.
        PlanError: If `plan` was made for another layout, or comes with a mask, score or normalizer; or if the
            normalizer has no log-sum-exp or remainder to return.
        MaskError: If the normalizer does not support the mask.
        BackendError: If the named backend cannot run the plan.

    >>> from flexjag.algebra.masks import Causal, Prefix, Window
    >>> lengths = [3, 0, 5]
    >>> q, k, v = (Jagged.from_lengths(torch.randn(8, 2, 16), lengths) for _ in range(3))
    >>> attention(q, k, v, mask=Causal() & (Window(2, 0) | Prefix(1)))
    Jagged(segments=3, tokens=8, values=[8, 2, 16] float32, device=cpu)
    """
    q, k, v = in_one_dtype(q, k, v)
    check_inputs(q, k, v)
    if plan is None:
        kind = Recipe if holds_no_numbers(q.values) else OneCall
        recipe = outline(kind, q, k, mask, score, normalizer, Bounds(validate=validate))
    elif mask is not None or score is not None or normalizer is not None:
        raise PlanError(
            explain_values("plan", "already holds a mask, score and normalizer; pass one or the other", plan=plan)
        )
    else:
        check_plan(plan, q, k, validate=validate)
        recipe = plan
    scale = checked_scale(scale, q.values.shape[2])
    found = functions.learned_tensors(recipe.score, torch.float32, recipe.place)
    sinks = checked_sinks(sinks, recipe.normalizer, q.values)
    dropped = dropping(recipe, q, dropout, dropout_ids, generator)
    by_lse = sinks is not None or (dropped is not None and isinstance(recipe.normalizer, Softmax))
    learned = (*found, *normalizers.tensors(recipe.normalizer), *(() if sinks is None else (sinks,)))
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in learned)
    known = {
        "tracing": holds_no_numbers(q.values),
        "dtype": q.values.dtype,
        "grad": learns
        or (torch.is_grad_enabled() and (q.values.requires_grad or k.values.requires_grad or v.values.requires_grad)),
        "scale": scale,
        "lse": return_lse or by_lse,
        "dims": (q.values.shape[1], k.values.shape[1], q.values.shape[2], v.values.shape[2]),
        "plain": needs_plain_operations(),
    }
    decide = partial(_decide, recipe, dropped, backend, known, return_remainder, learns)
    chosen = BACKENDS[decide()]
    need_rest = return_lse or return_remainder or by_lse
    if is_empty(q.values.shape[0]) or is_empty(k.values.shape[0]):
        out, rest = _nothing(q.values, k.values, v.values, *(x for x in learned if x.dtype.is_floating_point))
        rest = rest.exp() + 1 if return_remainder else rest
    else:
        given = q.values, k.values, v.values, recipe, scale, need_rest
        try:
            out, rest = _attend(dropped, chosen, *given)
        except BuildError:
            if backend != "auto":
                raise
            chosen = BACKENDS[decide(without=chosen.name)]
            out, rest = _attend(dropped, chosen, *given)
    kept = rest is not None or not need_rest
    assert kept, f"backend {chosen.name!r} promises a log-sum-exp or remainder, and returned None"
    if sinks is not None and rest is not None:
        out, rest = with_sinks(out, rest, sinks, recipe.layout)
    if rest is None or not (return_lse or return_remainder):
        return q.with_values(out)
    return q.with_values(out), q.with_values(rest)


def _decide(
    recipe: Recipe,
    dropped: Dropping | None,
    backend: str,
    known: dict[str, Any],
    return_remainder: bool,
    learns: bool,
    without: str | None = None,
) -> str:
    """Name of the backend for a call, after checks of the call; ``auto`` does not take the one named by `without`.

    Cached in the plan outside of traced graphs, as long as no backend is registered or removed.
    """
    facts = (x for name, x in known.items() if name != "scale")
    key = backend, return_remainder, learns, dropped is None, known["scale"] > 0, *facts, *BACKENDS
    if not known["tracing"] and without is None and key in recipe.own_notes:
        return recipe.own_notes[key]
    normalizer, heads = recipe.normalizer, known["dims"][0]
    if known["lse"] and not isinstance(normalizer, Softmax):
        raise PlanError(explain_values("return_lse", "only a softmax has a log-sum-exp", normalizer=normalizer))
    if return_remainder and not isinstance(normalizer, StickBreaking):
        rule = "only stick-breaking leaves a remainder"
        raise PlanError(explain_values("return_remainder", rule, normalizer=normalizer))
    if recipe.heads is not None and recipe.heads != heads:
        nodes = recipe.mask, recipe.score, normalizer
        per_head = (x for node in nodes for x in tensors_along(node) if x.heads is not None)
        seen = {"made_for": recipe.heads, "heads": heads, **{x.name: tuple(x.tensor.shape) for x in per_head}}
        raise ShapeError(explain_values("mask, score", "must be made for q's heads", **seen))
    name = pick(backend, Case.of(recipe if dropped is None else dropped.recipe, **known), without)
    if not known["tracing"]:
        recipe.own_notes[key] = name
    return name


def _attend(dropped: Dropping | None, backend: Backend, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Pair:
    """Run a backend; with `dropped` and a softmax twice, as its denominator is over all keys, the sum of values not."""
    recipe, scale, need_rest = rest
    if dropped is None:
        return _execute(backend, q, k, v, recipe, scale, need_rest)
    out, lse_of_kept = _execute(backend, q, k, v, dropped.recipe, scale, need_rest)
    if not isinstance(recipe.normalizer, Softmax):
        return out / dropped.kept, lse_of_kept
    _, lse = _execute(backend, q, k, v.detach(), recipe, scale, True)
    assert lse_of_kept is not None, f"backend {backend.name!r} promises a log-sum-exp, and returned None"
    assert lse is not None
    return rescaled(out, lse_of_kept, lse, dropped.kept), lse


def _execute(backend: Backend, q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, scale: float, need_rest: bool) -> Pair:
    """Run a backend in the dtype of its inputs, autocast or not.

    Spare rows contribute nothing to results, nor gradients of their results to anything.
    """
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):  # backends choose what they compute in
        with torch.autocast(q.device.type, enabled=False):
            return _execute(backend, q, k, v, recipe, scale, need_rest)
    layout = recipe.layout
    if recipe.made_tiles is None and backend.needs_tiles:
        recipe = with_tiles(recipe)
    if not layout.has_spare:
        return backend.run(q, k, v, recipe, scale, need_rest)
    spare, spare_keys = (x >= layout.num_segments for x in (layout.q_segment, layout.kv_segment))
    q, k, v = (x.masked_fill(at[:, None, None], 0.0) for x, at in ((q, spare), (k, spare_keys), (v, spare_keys)))
    clear: Callable[[Tensor], Tensor] = lambda x: x.masked_fill(spare, 0.0) if x.ndim else x  # noqa: E731
    recipe = replace(recipe, normalizer=replaced(recipe.normalizer, clear, ("query token",)))
    out, rest = backend.run(q, k, v, recipe, scale, need_rest)
    nothing = 1.0 if isinstance(recipe.normalizer, StickBreaking) else -torch.inf
    rest = None if rest is None or rest.ndim != 2 else rest.masked_fill(spare[:, None], nothing)
    return out.masked_fill(spare[:, None, None], 0.0), rest


def _nothing(q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> tuple[Tensor, Tensor]:
    """Result without queries or without keys: zeros, connected to every input that may need a gradient."""
    link = sum(x.flatten()[:0].sum().to(q.dtype) for x in (q, k, v, *learned))
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2]) + link
    return out, q.new_full(q.shape[:2], -torch.inf) + link


def check_inputs(q: Jagged, k: Jagged, v: Jagged) -> None:
    """Check shapes, dtypes and devices of an attention call; metadata only.

    Raises:
        ShapeError: If shapes, dtypes or devices do not fit, naming the argument, the rule and the values.
        LayoutError: If k and v do not have the same offsets.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Jagged):
            raise ShapeError(explain_values(name, "must be a flexjag.Jagged", type=type(x).__name__))
        if x.values.ndim != 3:
            raise ShapeError(explain_values(name, "values must be [T, heads, dim]", shape=tuple(x.values.shape)))
        if not x.values.dtype.is_floating_point:
            raise ShapeError(explain_values(name, "values must be floating point", dtype=x.values.dtype))
        check_computable(name, x.values)
    if not q.values.dtype == k.values.dtype == v.values.dtype:
        raise ShapeError(
            explain_values("q, k, v", "must share a dtype", q=q.values.dtype, k=k.values.dtype, v=v.values.dtype)
        )
    if not q.values.device == k.values.device == v.values.device:
        raise ShapeError(
            explain_values(
                "q, k, v", "must share a device", q=str(q.values.device), k=str(k.values.device), v=str(v.values.device)
            )
        )
    heads, groups = q.values.shape[1], k.values.shape[1]
    if heads < 1 or groups < 1 or heads % groups:
        raise ShapeError(explain_values("k", "q's heads H must be a multiple of k's heads G", H=heads, G=groups))
    if v.values.shape[1] != groups:
        raise ShapeError(explain_values("v", "must have as many heads as k", v=v.values.shape[1], k=groups))
    if q.values.shape[2] != k.values.shape[2]:
        raise ShapeError(explain_values("k", "must have q's head dim D", q=q.values.shape[2], k=k.values.shape[2]))
    if not same_size(v.values.shape[0], k.values.shape[0]):
        raise ShapeError(explain_values("v", "must have as many tokens as k", v=v.values.shape[0], k=k.values.shape[0]))
    check_same_layout(k, v, "v", "must have the offsets of k")


def check_plan(plan: Plan, q: Jagged, k: Jagged, *, validate: bool = False) -> None:
    """Check that `plan` was made for the layout of q and k: by shape, and by content on CPU or under `validate`.

    Raises:
        PlanError: If it was not.
    """
    if not isinstance(plan, Plan):
        raise PlanError(explain_values("plan", "must come from flexjag.plan", type=type(plan).__name__))
    layout = plan.layout
    made = (layout.num_q, layout.num_kv, layout.num_segments)
    seen = (q.values.shape[0], k.values.shape[0], q.num_segments)
    same = made == seen and k.num_segments == q.num_segments and q.offsets.device == layout.device
    pairs = [(q.offsets, layout.q_offsets)]
    if q.offsets is not k.offsets or layout.q_offsets is not layout.kv_offsets:
        pairs.append((k.offsets, layout.kv_offsets))
    difference = None
    if same and holds_no_numbers(q.offsets):
        if not layout.on_gpu:
            alike = (q.offsets == layout.q_offsets).all() & (k.offsets == layout.kv_offsets).all()
            assert_on_device(alike, "plan: was made for another layout; make one per batch")
    elif same and (validate or layout.device.type == "cpu"):
        for name, (given, planned) in zip(("q", "k"), pairs, strict=False):
            if difference is None and not torch.equal(given.to(torch.int32), planned):
                at = int((given != planned).nonzero()[0])
                difference = {f"{name}.offsets[{at}]": int(given[at]), f"plan's offsets[{at}]": int(planned[at])}
    check_reading(plan)
    if not same or difference is not None:
        rule = "was made for another layout; make one per batch, with flexjag.plan(q, k) if their offsets differ"
        values = {"plan_tokens": made[:2], "plan_segments": made[2], "tokens": seen[:2], "segments": seen[2]}
        raise PlanError(explain_values("plan", rule, **(difference or values)))
