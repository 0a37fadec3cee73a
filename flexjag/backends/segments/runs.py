"""SDPA's calls and their biases: whole segments, or runs of a segment's queries with the range of their allowed keys.

If mask and score depend on positions within a segment only, one bias serves all segments: it is evaluated for the
longest one, and each run slices its rows and columns. Otherwise a bias is evaluated per run.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from flexjag.algebra.tree import held_tensors, is_by_position
from flexjag.backends.segments.batches import Range
from flexjag.backends.segments.cost import SHARED
from flexjag.jagged import Jagged
from flexjag.lowering.layout import INT32_MAX
from flexjag.lowering.outline import outline
from flexjag.lowering.recipe import Recipe

ROWS = 256  # queries per call where a mask tensor is needed: bounds the mask, and lets a window skip keys


@dataclass(frozen=True, eq=False)
class Shared:
    """A bias shared by all segments.

    Attributes:
        bias: ``[1, H or 1, N, M]`` for the longest segment, -inf where masked.
        keyless: Per run, bool ``[1, H or 1, n]`` of its rows without a key; None if all rows have one.
    """

    bias: Tensor
    keyless: list[Tensor | None]


@dataclass(frozen=True, eq=False)
class Runs:
    """A plan cut into calls, on the host.

    Attributes:
        q_ranges: Packed query rows of each call: all rows, in order, the spare ones last.
        kv_ranges: Packed keys of each call; empty if its rows have no key.
        places: Local positions of each call's first query and first key.
    """

    q_ranges: list[Range]
    kv_ranges: list[Range]
    places: list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class SdpaCalls:
    """The calls of SDPA for a plan.

    Attributes:
        recipe: The recipe.
        scale: Factor on ``q·k``.
        runs: Query and key ranges of each call.
        causal: SDPA's ``is_causal``, where that is the mask, each call is a whole segment, and all keys come in order;
            None if the calls take a mask tensor.
        shared: The shared bias; None if each call has its own.
    """

    recipe: Recipe
    scale: float
    runs: Runs
    causal: bool | None
    shared: Shared | None = None

    @property
    def q_ranges(self) -> list[Range]:
        """Packed query rows of each call."""
        return self.runs.q_ranges

    @property
    def kv_ranges(self) -> list[Range]:
        """Packed keys of each call."""
        return self.runs.kv_ranges


def whole_segments(recipe: Recipe, scale: float, causal: bool) -> SdpaCalls:
    """One call per segment, without a mask tensor."""
    layout = recipe.layout
    q, kv = layout.q_offsets.tolist(), layout.kv_offsets.tolist()
    # The spare rows of either side are calls of their own, which meet nothing.
    q_ranges = [*itertools.pairwise(q), (q[-1], layout.num_q), (layout.num_q, layout.num_q)]
    kv_ranges = [*itertools.pairwise(kv), (kv[-1], kv[-1]), (kv[-1], layout.num_kv)]
    return SdpaCalls(recipe, scale, Runs(q_ranges, kv_ranges, [(0, 0)] * len(q_ranges)), causal)


def runs_of_queries(recipe: Recipe, scale: float, heads: int, acc: torch.dtype, may_share: bool) -> SdpaCalls:
    """Calls of at most ROWS queries of one segment, each with the keys from its first to its last allowed one.

    Args:
        recipe: The recipe.
        scale: Factor on ``q·k``.
        heads: H.
        acc: Dtype of the bias.
        may_share: Allow one bias for all calls, into which gradients flow.
    """
    if "runs" not in recipe.notes:
        recipe.notes["runs"] = _list_runs(recipe)
    runs: Runs = recipe.notes["runs"]
    if not may_share or not is_by_position(recipe.mask, recipe.score, recipe.layout.is_self):
        return SdpaCalls(recipe, scale, runs, None)
    held = [] if recipe.score is None else held_tensors(recipe.score)
    if torch.is_grad_enabled() and any(t.requires_grad for t in held):
        return SdpaCalls(recipe, scale, runs, None, _share(recipe, runs, heads, acc))
    key = "bias", heads, acc
    copies, shared = recipe.own_notes.get(key, (None, None))
    # The values decide: tensors are written to in ways that their version does not tell.
    if copies is None or not all(torch.equal(x, y) for x, y in zip(copies, held, strict=True)):
        shared = _share(recipe, runs, heads, acc)
        recipe.own_notes[key] = [t.detach().clone() for t in held], shared
    return SdpaCalls(recipe, scale, runs, None, shared)


def _list_runs(recipe: Recipe) -> Runs:
    layout = recipe.layout
    ends, kv_ends = layout.q_offsets.tolist(), layout.kv_offsets.tolist()
    q_ranges = [(at, min(at + ROWS, end)) for start, end in itertools.pairwise(ends) for at in range(start, end, ROWS)]
    owner = [bisect_right(ends, a) - 1 for a, _ in q_ranges]
    q_ranges.append((ends[-1], layout.num_q))
    lo = torch.cat([torch.where(x.outer.hi > x.outer.lo, x.outer.lo, INT32_MAX) for x in recipe.sandwiches]).amin(0)
    hi = torch.cat([torch.where(x.outer.hi > x.outer.lo, x.outer.hi, 0) for x in recipe.sandwiches]).amax(0)
    run = torch.repeat_interleave(torch.tensor([b - a for a, b in q_ranges], device=lo.device))
    first = lo.new_full((len(q_ranges),), INT32_MAX).scatter_reduce(0, run, lo, "amin").tolist()
    last = hi.new_zeros(len(q_ranges)).scatter_reduce(0, run, hi, "amax").tolist()
    kv_ranges = [(a, b) if a < b else (0, 0) for a, b in zip(first, last, strict=True)]
    places = [(q[0] - ends[x], kv[0] - kv_ends[x]) for q, kv, x in zip(q_ranges, kv_ranges, owner, strict=False)]
    return Runs(q_ranges, kv_ranges, [*places, (0, 0)])


def _share(recipe: Recipe, runs: Runs, heads: int, acc: torch.dtype) -> Shared | None:
    """The bias of the longest segment; None if it exceeds SHARED numbers or costs more than one bias per run.

    A run's own bias is computed twice, once more in the backward.
    """
    layout = recipe.layout
    if layout.num_segments == 0:
        return None
    n, m = int(layout.q_offsets.diff().max()), int(layout.kv_offsets.diff().max())
    needed = sum((b - a) * (d - c) for (a, b), (c, d) in zip(runs.q_ranges, runs.kv_ranges, strict=True))
    if n * m > 2 * needed or n * m * heads > SHARED:
        return None
    one_q, one_kv = (_one_segment(tokens, layout.device) for tokens in (n, m))
    one = outline(Recipe, one_q, None if layout.is_self else one_kv, recipe.mask, recipe.score, recipe.normalizer)
    bias, allowed = _evaluate(one, (0, n), (0, m), heads, acc)
    keyless: list[Tensor | None] = []
    for (a, b), (c, d), (i, j) in zip(runs.q_ranges, runs.kv_ranges, runs.places, strict=True):
        none = ~allowed[:, i : i + b - a, j : j + d - c].any(2)[None]
        keyless.append(none if a < b and c < d and bool(none.any()) else None)
    return Shared(bias.masked_fill(~allowed, -torch.inf)[None], keyless)


def _one_segment(tokens: int, device: torch.device) -> Jagged:
    return Jagged(torch.empty(tokens, 0, device=device), torch.tensor([0, tokens], device=device))


def _evaluate(recipe: Recipe, rows: Range, keys: Range, heads: int, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """Score (of a product of 0) and mask of a range of packed queries and keys, ``[H or 1, n, m]``.

    The score is in `acc`, not in half precision: a bias may be hundreds.
    """
    device = recipe.layout.device
    h = torch.arange(heads, device=device)[:, None, None]
    q, kv = torch.arange(*rows, device=device)[None, :, None], torch.arange(*keys, device=device)[None, None]
    allowed = recipe.mask_mod(h.new_zeros(()), h, q, kv).expand(-1, q.shape[1], kv.shape[2])
    bias = torch.zeros((), dtype=acc, device=device)
    if recipe.score_mod is not None:
        bias = recipe.score_mod(bias.expand(1, *allowed.shape[1:]), h.new_zeros(()), h, q, kv).to(acc)
        allowed = allowed & (bias != -torch.inf)  # a row may be left without a key by that
    return bias, allowed


def bias_of(calls: SdpaCalls, index: int, heads: int, acc: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The additive bias ``[1, H or 1, n, m]``, -inf where masked, and bool ``[1, H or 1, n]``: rows without a key.

    A row without keys gets an unmasked bias, which the kernel needs; the caller zeroes its output. The second is None
    if all rows have a key; both are None if SDPA masks by itself.
    """
    if calls.causal is not None:
        return None, None
    (a, b), (c, d) = calls.q_ranges[index], calls.kv_ranges[index]
    if calls.shared is not None:
        i, j = calls.runs.places[index]
        bias, no_key = calls.shared.bias[..., i : i + b - a, j : j + d - c], calls.shared.keyless[index]
        return (bias, None) if no_key is None else (bias.masked_fill(no_key[..., None], 0.0), no_key)
    bias, allowed = _evaluate(calls.recipe, (a, b), (c, d), heads, acc)
    none = ~allowed.any(2)
    some = bool(none.any())
    bias = torch.where(allowed, bias, -torch.inf)
    bias = bias.masked_fill(none[..., None], 0.0) if some else bias
    return bias[None], none[None] if some else None
