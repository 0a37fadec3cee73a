"""Hypothesis strategies: jagged batches, masks and scores, small and full of edge cases.

Structure (lengths, heads, nodes) is drawn element by element, so that it shrinks; tensor data comes from one drawn
seed, so that an example costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from flexjag.algebra import masks as m
from flexjag.algebra import scores as s
from flexjag.algebra.node import Align
from flexjag.algebra.tokens import Keys, Queries
from flexjag.api.plan import Plan
from flexjag.api.plan import plan as make_plan
from flexjag.jagged import Jagged

SEEDS = st.integers(0, 2**16)
TILES = (16, 32)
LIMITS = (2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**70)
INTEGERS = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lengths(
    *, min_segments: int = 0, max_segments: int = 5, max_total: int = 100, tile: int = 16
) -> st.SearchStrategy[list[int]]:
    """Segment lengths, often 0, 1, and one less than, equal to and one more than a tile.

    Args:
        min_segments: Minimal S.
        max_segments: Maximal S.
        max_total: Maximal T; segments beyond it are truncated.
        tile: Tile size; `tile` - 1, `tile` and `tile` + 1 are drawn often.

    >>> from hypothesis import find
    >>> 0 in find(lengths(), lambda n: sum(n) > 10 and 0 in n)
    True
    """
    edges = st.sampled_from([0, 1, 2, tile - 1, tile, tile + 1, 2 * tile])
    length = st.one_of(st.integers(1, 2 * tile + 8), edges)

    def cut(drawn: list[int]) -> list[int]:
        kept: list[int] = []
        for n in drawn:
            kept.append(min(n, max_total - sum(kept)))
        return kept

    # Draw the size first, because st.lists of variable length is empty too often.
    sizes = st.sampled_from(range(min_segments, max_segments + 1))
    return sizes.flatmap(lambda n: st.lists(length, min_size=n, max_size=n)).map(cut)


def _jagged(
    total: int, shape: tuple[int, ...], offsets: Tensor, dtype: torch.dtype, generator: torch.Generator
) -> Jagged:
    values = torch.randn((total, *shape), generator=generator, dtype=torch.float64)
    return Jagged(values.to(dtype), offsets)


@st.composite
def jagged_batches(  # noqa: D417 (callers do not pass `draw`)
    draw: st.DrawFn,
    *,
    q_lengths: Sequence[int] | None = None,
    kv_lengths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
    max_total: int = 100,
    tile: int = 16,
) -> tuple[Jagged, Jagged, Jagged]:
    """``(q, k, v)``: self- or cross-attention, grouped heads (H = G, 2G, 3G), E equal to D or not.

    Args:
        q_lengths: Query lengths. Default: drawn.
        kv_lengths: Key lengths. Default: either the query lengths (q, k and v then share one offsets tensor) or drawn.
        dtype: Dtype of the values, which are standard normal.
        max_total: Maximal number of packed tokens of queries and of keys.
        tile: Passed to :func:`lengths`.
    """
    if q_lengths is None:
        q_lengths = draw(lengths(max_total=max_total, tile=tile))
    if kv_lengths is None and draw(st.booleans()):
        size = len(q_lengths)
        kv_lengths = draw(lengths(min_segments=size, max_segments=size, max_total=max_total, tile=tile))
    groups, repeats = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)]))
    dim, value_dim = draw(st.sampled_from([(8, 8), (16, 16), (4, 16), (16, 4), (1, 1), (8, 24)]))
    g = _generator(draw(SEEDS))
    q_offsets = torch.tensor([0, *q_lengths]).cumsum(0)
    kv_offsets = q_offsets if kv_lengths is None else torch.tensor([0, *kv_lengths]).cumsum(0)
    q_total, kv_total = int(q_offsets[-1]), int(kv_offsets[-1])
    q = _jagged(q_total, (groups * repeats, dim), q_offsets, dtype, g)
    k = _jagged(kv_total, (groups, dim), kv_offsets, dtype, g)
    return q, k, _jagged(kv_total, (groups, value_dim), kv_offsets, dtype, g)


def _dilated(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (q - kv).abs() % 3 == 0


def _by_head(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (q + kv) % 3 <= h % 3


def _by_segment(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (kv - q) % (b + 2) == 0


def _nothing(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return kv < kv - q * 0  # False, as a tensor


@dataclass(frozen=True)
class _Nodes:
    """Strategies for mask nodes that match given lengths."""

    q_lengths: Sequence[int]
    kv_lengths: Sequence[int]
    heads: int
    portable: bool
    interval: bool

    def bound(self, draw: st.DrawFn, least: int) -> int | Tensor:
        """Draw a bound, small or large: an int, or one per segment."""
        value = st.one_of(st.integers(least, 6), st.sampled_from([15, 16, 17, 200, *LIMITS]))
        if self.portable or draw(st.integers(0, 2)):
            return draw(value)
        g, dtype = _generator(draw(SEEDS)), draw(st.sampled_from(INTEGERS))
        least = least if dtype.is_signed else max(least, 0)
        values = torch.randint(least, 20, (len(self.q_lengths),), generator=g).tolist()
        if values and draw(st.booleans()):
            values[0] = draw(st.sampled_from([torch.iinfo(dtype).max, torch.iinfo(dtype).min if least < 0 else least]))
        return torch.tensor(values, dtype=dtype)

    def leaf(self, draw: st.DrawFn) -> m.Mask:
        """Draw a leaf node."""
        kinds = ["full", "causal", "window", "prefix", "chunked", "global"]
        kinds += [] if self.portable else ["rows", "queries"]
        if not self.interval:
            kinds += ["dense", "mod"] if self.portable else ["dense", "mod", "group", "packed", "keys"]
        align: st.SearchStrategy[Align] = st.sampled_from(("start", "end"))
        match draw(st.sampled_from(kinds)):
            case "full":
                return m.Full()
            case "causal":
                return m.Causal(draw(align))
            case "window":
                left, right = (None if draw(st.integers(0, 3)) == 0 else self.bound(draw, -3) for _ in range(2))
                if isinstance(left, int) and isinstance(right, int):
                    right = max(right, -left)  # two ints must leave a key
                return m.Window(left, right, align=draw(align))
            case "prefix":
                return m.Prefix(self.bound(draw, 0))
            case "chunked":
                return m.Chunked(self.bound(draw, 1), draw(align))
            case "global":
                return m.GlobalTokens(self.bound(draw, 0))
            case "mod":
                mods = [_dilated, _by_head, _nothing] if self.portable else [_dilated, _by_head, _nothing, _by_segment]
                return m.MaskMod(draw(st.sampled_from(mods)))
            case kind:
                return self.data(draw, kind)

    def data(self, draw: st.DrawFn, kind: str) -> m.Mask:
        """Draw a node with per-token data."""
        g = _generator(draw(SEEDS))
        q_total, kv_total = sum(self.q_lengths), sum(self.kv_lengths)
        longest = max([0, *self.kv_lengths])
        match kind:
            case "rows":
                count = draw(st.sampled_from([None, 1, 2, 3, 10]))
                shape = (q_total,) if count is None else (count, q_total)
                lo = torch.randint(-2, longest + 3, shape, generator=g)
                hi = lo + torch.randint(-1, 5, shape, generator=g)
                if draw(st.booleans()):  # some spans unbounded below, some above
                    ends = torch.iinfo(torch.int64)
                    lo, hi = lo.masked_fill(lo < 0, ends.min), hi.masked_fill(hi > longest, ends.max)
                return m.Rows(lo, hi)
            case "queries":
                return Queries(torch.rand(q_total, generator=g) < draw(st.sampled_from([0.1, 0.5, 1.0])))
            case "keys":
                marked = torch.rand(kv_total, generator=g) < draw(st.sampled_from([0.1, 0.5, 1.0]))
                return Keys(marked.sort(descending=True).values if draw(st.booleans()) else marked)
            case "group":
                groups = draw(st.integers(1, 4))
                ids = torch.randint(-1, groups, (q_total,), generator=g)
                own = self.q_lengths is self.kv_lengths and draw(st.booleans())
                kv_ids = None if own else torch.randint(-1, groups, (kv_total,), generator=g)
                if draw(st.booleans()):  # contiguous groups instead of scattered ones
                    ids, kv_ids = ids.sort().values, None if kv_ids is None else kv_ids.sort().values
                return m.SameGroup(ids, kv_ids)
            case "dense":
                rows, cols = draw(st.sampled_from([(0, 0), (1, 3), (16, 17), (40, 40)]))
                return m.Dense(torch.rand(rows, cols, generator=g) < draw(st.sampled_from([0.1, 0.5, 1.0])))
            case _:
                each = zip(self.q_lengths, self.kv_lengths, strict=True)
                return m.Dense.from_list([torch.rand(n, w, generator=g) < 0.5 for n, w in each])

    def tree(self, draw: st.DrawFn, depth: int) -> m.Mask:
        """Draw a node with at most `depth` operators above any leaf."""
        kinds = ["leaf", "and", "or", "not"] + ["heads"] * (self.heads > 1)
        match draw(st.sampled_from(kinds)) if depth else "leaf":
            case "and":
                return self.tree(draw, depth - 1) & self.tree(draw, depth - 1)
            case "or":
                return self.tree(draw, depth - 1) | self.tree(draw, depth - 1)
            case "not":
                return ~self.tree(draw, depth - 1)
            case "heads":
                return m.PerHead([self.tree(draw, min(1, depth - 1)) for _ in range(self.heads)])
            case _:
                return self.leaf(draw)


@st.composite
def masks(  # noqa: D417 (callers do not pass `draw`)
    draw: st.DrawFn,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int] | None = None,
    *,
    heads: int = 1,
    depth: int = 4,
    portable: bool = False,
    interval: bool = False,
) -> m.Mask:
    """Masks over the whole node set, nested with ``&``, ``|`` and ``~``.

    Args:
        q_lengths: Query lengths, for the shapes of tensors in the mask.
        kv_lengths: Key lengths. Default: `q_lengths`, which also allows ``SameGroup(ids)`` without `kv_ids`.
        heads: H; ``PerHead`` is drawn only if H > 1.
        depth: Maximal number of operators above a leaf.
        portable: Draw only nodes without data per segment or token, so that the mask is valid for any batch.
        interval: Draw only nodes that are exact spans.
    """
    nodes = _Nodes(q_lengths, q_lengths if kv_lengths is None else kv_lengths, heads, portable, interval)
    return nodes.tree(draw, depth)


@st.composite
def scores(  # noqa: D417 (callers do not pass `draw`)
    draw: st.DrawFn,
    num_heads: int,
    *,
    dtype: torch.dtype = torch.float64,
    additive: bool = False,
    portable: bool = False,
    learned: bool = True,
    lengths: tuple[Sequence[int], Sequence[int]] | None = None,
) -> tuple[s.Score | None, list[Tensor]]:
    """Chains of up to three scores, or None, with the list of their tensors that require gradients.

    Args:
        num_heads: H.
        dtype: Dtype of the tensors.
        additive: Draw only scores that add a bias, as ``backend="segments"`` requires.
        portable: Draw only scores independent of the segment index, so that a segment can be attended alone.
        learned: Whether tensors require gradients.
        lengths: Lengths of queries and keys, for biases that are given for each pair; without them none is drawn.
    """
    g = _generator(draw(SEEDS))
    leaves: list[Tensor] = []

    def tensor(*shape: int) -> Tensor:
        out = torch.rand(shape, generator=g, dtype=torch.float64).to(dtype)
        if learned and draw(st.booleans()):
            leaves.append(out.requires_grad_())
        return out

    kinds = ["alibi", "bias", "t5", "buckets"] + ["pairs"] * (lengths is not None)
    kinds += [] if additive else ["cap", "temperature", "replace"]
    align: st.SearchStrategy[Align] = st.sampled_from(("start", "end"))
    kinds += [] if additive or portable else ["by segment"]
    chain: s.Score | None = None
    for kind in [draw(st.sampled_from(kinds)) for _ in range(draw(st.sampled_from([0, 1, 2, 3])))]:
        if kind == "alibi":
            one: s.Score = s.Alibi(tensor(num_heads), draw(st.booleans()), draw(align))
        elif kind == "bias":
            one = s.RelativeBias(tensor(num_heads, 2 * draw(st.integers(0, 3)) + 1), draw(align))
        elif kind == "t5":
            one = s.T5Bias(tensor(num_heads, 8), draw(st.booleans()), draw(st.sampled_from([5, 9])), draw(align))
        elif kind == "buckets":
            one = s.BucketedBias(tensor(num_heads, 4), torch.tensor([-3, 0, 5]), draw(align))
        elif kind == "pairs" and lengths is not None:
            packed = [sum(n * m for n, m in zip(*lengths, strict=True))]
            shared = [max(x, default=0) + draw(st.integers(0, 2)) for x in lengths]
            sizes = shared if portable or draw(st.booleans()) else packed
            one = s.DenseBias(tensor(draw(st.sampled_from([1, num_heads])), *sizes))
        elif kind == "cap":
            one = s.SoftCap(draw(st.sampled_from([1, 2.5, 30.0])))
        else:
            one = _user_score(kind, tensor(num_heads))
        chain = one if chain is None else chain >> one
    return chain, leaves


def _user_score(kind: str, table: Tensor) -> s.ScoreMod:
    """A user's score function that closes over a tensor ``[H]``."""

    def temperature(x: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return x * (0.5 + table[h])

    def by_segment(x: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return x + table[h] * ((q - kv) % (b + 2))

    def replace(x: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (table[h] * ((q + kv) % 5)).to(x.dtype)

    return s.ScoreMod({"temperature": temperature, "by segment": by_segment, "replace": replace}[kind])


@dataclass(frozen=True, eq=False)
class Problem:
    """An attention problem: q, k and v with a mask, a score and a tile size.

    Attributes:
        q: ``[T_q, H, D]``.
        k: ``[T_kv, G, D]``.
        v: ``[T_kv, G, E]``.
        mask: Mask, valid for the batch.
        score: Score for H heads, or None.
        learned: The tensors in `score` that require gradients.
        block_size: Tile size.
    """

    q: Jagged
    k: Jagged
    v: Jagged
    mask: m.Mask
    score: s.Score | None
    learned: list[Tensor]
    block_size: int

    @property
    def heads(self) -> int:
        """Number of query heads H."""
        return self.q.values.shape[1]

    def plan(self) -> Plan:
        """Compile the plan of this problem."""
        return make_plan(self.q, self.k, mask=self.mask, score=self.score, block_size=self.block_size)

    def __repr__(self) -> str:
        return (
            f"Problem(q_lengths={self.q.lengths.tolist()}, kv_lengths={self.k.lengths.tolist()}, "
            f"q={list(self.q.values.shape)}, v={list(self.v.values.shape)}, self={self.q.offsets is self.k.offsets}, "
            f"mask={self.mask!r}, score={self.score!r}, block_size={self.block_size})"
        )


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    dtype: torch.dtype = torch.float64,
    depth: int = 4,
    portable: bool = False,
    interval: bool = False,
    score: bool = True,
    additive: bool = False,
    max_total: int = 100,
) -> Problem:
    """Complete :class:`Problem` instances; arguments as for :func:`jagged_batches`, :func:`masks` and :func:`scores`.

    >>> from hypothesis import find
    >>> find(problems(), lambda p: p.q.num_segments == 2 and p.heads > 1).q.num_segments
    2
    """
    tile = draw(st.sampled_from(TILES))
    q, k, v = draw(jagged_batches(dtype=dtype, max_total=max_total, tile=tile))
    q_lengths, heads = q.lengths.tolist(), q.values.shape[1]
    kv_lengths = None if q.offsets is k.offsets else k.lengths.tolist()
    mask = draw(masks(q_lengths, kv_lengths, heads=heads, depth=depth, portable=portable, interval=interval))
    wide = torch.promote_types(dtype, torch.float32)  # as in mixed precision: parameters stay float32
    lengths = q_lengths, q_lengths if kv_lengths is None else kv_lengths
    drawn = scores(heads, dtype=wide, additive=additive, portable=portable, lengths=lengths)
    chain, learned = draw(drawn) if score else (None, [])
    return Problem(q, k, v, mask, chain, learned, tile)
