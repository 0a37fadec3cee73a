"""plan(): layout, mask, score and normalizer in, one immutable and reusable recipe out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexjag import choice, functions, mods, viz
from flexjag import masks as m
from flexjag import scores as s
from flexjag.errors import MaskError, PlanError, ScoreError, ShapeError, assert_on_device, explain_values
from flexjag.explain import explain
from flexjag.jagged import Jagged, mark_varying
from flexjag.layout import Layout, blocks, build_layout
from flexjag.nodes import check_node
from flexjag.normalizers import Normalizer, Softmax
from flexjag.spans import Sandwich, Spans, sandwich
from flexjag.tiles import TileList, Tiles, block_mask, build_tables, list_tiles, refine

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.nn.attention.flex_attention import BlockMask

REFINE_LIMIT = 2**26  # predicate evaluations that refining may cost when nobody asked for it


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What every layer of a model needs to attend over one batch. Made by :func:`plan`.

    Attributes:
        layout: Where the tokens sit.
        mask: The mask as given.
        score: The score as given, or None.
        normalizer: The normalizer.
        block_size: Tile size.
        sandwiches: The mask's spans, one entry per distinct head mask.
        head_of: ``[H]`` int32, which entry each query head uses; None if there is one for all.
        tables: Per-row tensors that the mods read.
        kernel_masks: What a kernel tests, one per sandwich, padded like `tables`.
        kernel_score: The score, padded likewise.
        made_tiles: Tile lists and tables; None in an outline, which only some backends can run.
        max_length: The bound that was given, or None.
        sample: ``(H, D, dtype, grad)`` of the q that was planned for, if it had heads.
    """

    layout: Layout
    mask: m.Mask
    score: s.Score | None
    normalizer: Normalizer
    block_size: int
    sandwiches: tuple[Sandwich, ...]
    head_of: Tensor | None
    tables: mods.RowTables
    kernel_masks: tuple[m.Mask, ...]
    kernel_score: s.Score | None
    made_tiles: Tiles | None
    max_length: int | None
    sample: tuple[int, int, torch.dtype, bool] | None

    @property
    def tiles(self) -> Tiles:
        """Tile lists and tables."""
        assert self.made_tiles is not None, "an outline never leaves attention()"
        return self.made_tiles

    @property
    def mask_mod(self) -> Callable[..., Tensor]:
        """FlexAttention's ``mask_mod(b, h, q_idx, kv_idx)`` on packed indices, isolation included."""
        return mods.mask_mod(self.kernel_masks, self.head_of, self.tables, self.layout)

    @property
    def score_mod(self) -> Callable[..., Tensor] | None:
        """FlexAttention's ``score_mod(score, b, h, q_idx, kv_idx)`` on packed indices, or None."""
        return mods.score_mod(self.kernel_score, self.tables)

    @property
    def block_mask(self) -> BlockMask:
        """FlexAttention's BlockMask; with `score_mod`, all that ``flex_attention`` needs.

        >>> x = Jagged.from_lengths(torch.zeros(300, 1, 16), [100, 200])
        >>> plan(x, mask=m.Causal()).block_mask.shape
        (1, 1, 300, 300)
        """
        return block_mask(self.tiles, self.mask_mod, self.layout.num_q, self.layout.num_kv, self.block_size)

    @property
    def exact(self) -> bool:
        """Whether the mask is exactly its spans, so that no predicate is left to evaluate."""
        return all(x.exact for x in self.sandwiches)

    @property
    def num_tiles(self) -> int:
        """Non-empty tiles, all heads' masks united. Reads the device."""
        return int(self.tiles.all_heads.live.sum())

    @property
    def num_full(self) -> int:
        """Tiles that need no masking, all heads' masks united. Reads the device."""
        return int(self.tiles.all_heads.full.sum())

    @property
    def grid(self) -> tuple[int, int]:
        """Tile rows and tile columns of the packed score matrix."""
        return blocks(self.layout.num_q, self.block_size), blocks(self.layout.num_kv, self.block_size)

    @property
    def density(self) -> float:
        """The share of the packed T_q × T_kv score matrix that lies in non-empty tiles."""
        rows, cols = self.grid
        return self.num_tiles / (rows * cols) if self.layout.num_q and self.layout.num_kv else 0.0

    @property
    def flops(self) -> int:
        """Floating-point operations of one forward over the non-empty tiles: ``4·tiles·block²·H·D``.

        Raises:
            PlanError: If the plan was made from values without heads ``[T, H, D]``.
        """
        if self.sample is None:
            raise PlanError(
                explain_values("q", "FLOPs need a plan made from values of shape [T, H, D], to know H and D")
            )
        heads, dim = self.sample[:2]
        return 4 * self.num_tiles * self.block_size**2 * heads * dim

    @property
    def backend(self) -> str:
        """What ``backend="auto"`` takes for the q that was planned for."""
        return choice.choose(self.case())[0]

    def case(self, **known: object) -> choice.Case:
        """The plan as backends' rules see it, with what the caller knows besides."""
        if not known and self.sample is not None:
            heads, dim, dtype, grad = self.sample
            known = {"dtype": dtype, "grad": grad, "dims": (heads, heads, dim, dim)}
        known["block_size"] = self.block_size
        return choice.Case(self.layout, self.mask, self.score, self.normalizer, **known)  # type: ignore[arg-type]

    def to_dense(self, heads: int | None = None) -> Tensor:
        """The mask as bool ``[T_q, T_kv]``, or ``[H, T_q, T_kv]`` if `heads` is given. For tests and pictures.

        Args:
            heads: H. Needed if the mask depends on the head.
        """
        device = self.layout.device
        if heads is None and self.head_of is not None:
            heads = self.head_of.shape[0]
        q = torch.arange(self.layout.num_q, device=device)[:, None]
        kv = torch.arange(self.layout.num_kv, device=device)[None]
        h = torch.arange(heads or 1, device=device)[:, None, None]
        if not q.numel() or not kv.numel():
            dense = torch.zeros(heads or 1, q.shape[0], kv.shape[1], dtype=torch.bool, device=device)
        else:
            shape = (heads or 1, q.shape[0], kv.shape[1])
            dense = self.mask_mod(h.new_zeros(()), h, q[None], kv[None]).expand(shape)
        return dense if heads is not None else dense[0]

    def explain(self) -> str:
        """What was decided and why, for people: backend, tiles, FLOPs, bytes."""
        return explain(self)

    def show(self, head: int = 0) -> Figure:
        """A picture of the tiles and segments, as a matplotlib Figure.

        Args:
            head: Which head to draw, if the mask depends on the head.
        """
        return viz.draw_plan(self, head)

    def _repr_html_(self) -> str:
        return viz.to_html(self)

    def __repr__(self) -> str:
        return (
            f"Plan({self.mask!r}, score={self.score!r}, segments={self.layout.num_segments}, "
            f"tokens={self.layout.num_q}x{self.layout.num_kv}, block_size={self.block_size})"
        )


def _head_masks(mask: m.Mask) -> tuple[list[m.Mask], list[int] | None]:
    """The distinct masks of the heads, and which one each head uses."""
    heads = m.num_mask_heads(mask)
    if heads is None:
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


def _capacity(layout: Layout, block: int, max_length: int | None) -> tuple[int, int] | None:
    """Most tiles in a row or column, and most in all, for segments of at most `max_length`; None without a bound.

    In self-attention a tile row meets one stretch of keys: its own tokens and at most a segment to either side.
    In cross-attention it may meet many segments, each in a stretch of its own, so only the grid bounds it.
    """
    if max_length is None:
        return None
    rows, cols = blocks(layout.num_q, block), blocks(layout.num_kv, block)
    width = (2 * max_length + block - 1) // block + 2 if layout.is_self else max(rows, cols)
    return width, max(2, rows * min(width, cols))


def plan(
    q: Jagged,
    k: Jagged | None = None,
    *,
    mask: m.Mask | None = None,
    score: s.Score | None = None,
    normalizer: Normalizer | None = None,
    block_size: int = 128,
    max_tokens: int | None = None,
    max_length: int | None = None,
    refine_tiles: bool | None = None,
    validate: bool = False,
) -> Plan:
    """Compile a layout, a mask and a score into a recipe that every layer of a model can reuse.

    Time and memory are O(K·T log T + tiles): nothing of size T×T is made. Works inside ``torch.compile``.

    Args:
        q: The query batch. Only its layout is used, so ``[T]`` token ids do as well as ``[T, H, D]``.
        k: The key/value batch, if its offsets differ from q's (cross- and target attention).
        mask: Default :class:`~flexjag.masks.Full`. Isolation between segments is always on.
        score: Default none. It is kept, not copied: a plan made once sees a parameter's later values.
        normalizer: Default :class:`~flexjag.normalizers.Softmax`.
        block_size: Tile size, a power of two of at least 16; 128 is what GPU kernels like.
        max_tokens: The fixed number of rows of ``q.values``, of which the first ``offsets[-1]`` are used;
            the others get zeros.
        max_length: A bound on every segment's length. With it the plan has fixed capacity and planning never
            waits for the device, so it fits in a CUDA graph. A batch that breaks it is an error; on a GPU, in a
            traced graph and with `max_tokens` an assertion, which a later call reports.
        refine_tiles: Evaluate an opaque mask on its PARTIAL tiles to prove more of them EMPTY or FULL.
            Default: if it takes at most 2**26 evaluations, and never in a traced graph or with `max_length`.
        validate: Check the contents of the offsets and the bounds (one device sync; in a traced graph an assertion).
            Outside of graphs, those on a CPU are always checked, but with `max_tokens`.

    Returns:
        The plan. Pass it to :func:`flexjag.attention` with any q, k, v of the same layout.

    Raises:
        LayoutError: If q and k do not fit together, or, under `validate`, offsets are not offsets.
        MaskError: If the mask does not fit the layout.
        PlanError: If a bound does not hold or `block_size` is no power of two.

    >>> x = Jagged.from_lengths(torch.zeros(1000, 2, 16), [400, 0, 600])
    >>> p = plan(x, mask=m.Causal() & m.Window(256, 0))
    >>> p.num_tiles, p.num_full, p.grid
    (20, 4, (8, 8))
    """
    return with_tiles(
        outline(q, k, mask, score, normalizer, block_size, max_tokens, max_length, validate), refine_tiles
    )


def outline(
    q: Jagged,
    k: Jagged | None,
    mask: m.Mask | None,
    score: s.Score | None,
    normalizer: Normalizer | None,
    block_size: int = 128,
    max_tokens: int | None = None,
    max_length: int | None = None,
    validate: bool = False,
) -> Plan:
    """The part of :func:`plan` that is linear in the tokens: everything but the tiles."""
    mask = m.Full() if mask is None else mask
    normalizer = Softmax() if normalizer is None else normalizer
    _check_plan(mask, score, normalizer, block_size, max_length)
    layout = build_layout(q, q if k is None else k, max_tokens=max_tokens, max_length=max_length, validate=validate)
    choice.check_normalizer(layout, mask, normalizer, lse=False, remainder=False)
    s.check_tokens(score, layout.num_q, layout.num_kv)
    if not torch.compiler.is_compiling():
        functions.check_functions(mask, score, layout.device)
    head_masks, head_of = _head_masks(mask)
    heads = None
    if head_of is not None:  # filled on the device: uploading a list would wait for it
        heads = torch.stack([torch.full((), i, dtype=torch.int32, device=layout.device) for i in head_of])
    sample = None
    if q.values.ndim == 3 and q.values.dtype.is_floating_point:
        grad = q.values.requires_grad and torch.is_grad_enabled()
        sample = (q.values.shape[1], q.values.shape[2], q.values.dtype, grad)
    sandwiches = tuple(sandwich(one, layout) for one in head_masks)
    tables = mods.row_tables(layout, block_size)
    return Plan(
        layout=layout,
        mask=mask,
        score=score,
        normalizer=normalizer,
        block_size=block_size,
        sandwiches=sandwiches,
        head_of=heads,
        tables=tables,
        kernel_masks=tuple(mods.kernel_mask(x, tables) for x in sandwiches),
        kernel_score=None if score is None else mods.rounded(score, tables),
        made_tiles=None,
        max_length=max_length,
        sample=sample,
    )


def with_tiles(plan: Plan, refine_tiles: bool | None = None) -> Plan:
    """An outlined plan with its tiles; `refine_tiles` as in :func:`plan`."""
    layout, block, sandwiches, max_length = plan.layout, plan.block_size, plan.sandwiches, plan.max_length
    if max_length is not None:
        for offsets in (layout.q_offsets, layout.kv_offsets):
            assert_on_device((offsets.diff() <= max_length).all(), "max_length: must bound every segment's length")
    capacity = _capacity(layout, block, max_length)
    width, size = (None, None) if capacity is None else capacity
    lists = [list_tiles(x.outer, x.inner, layout.num_kv, block, size) for x in sandwiches]
    if capacity is None and not torch.compiler.is_compiling():
        tables = plan.tables
        lists = [_refined(t, x, tables, layout, block, refine_tiles) for t, x in zip(lists, sandwiches, strict=True)]
    union, by_head = lists[0], lists
    if plan.head_of is not None:
        by_head = [lists[i] for i in _head_masks(plan.mask)[1] or ()]
    if len(lists) > 1:
        lo, hi = (torch.cat([getattr(x.outer, end) for x in sandwiches]) for end in ("lo", "hi"))
        nothing = Spans(layout.kv_start[None], layout.kv_start[None])
        union = list_tiles(Spans(lo, hi), nothing, layout.num_kv, block, size)
    tables = build_tables(by_head, layout.num_q, layout.num_kv, block, width)
    made = replace(plan, made_tiles=Tiles(union, *tables))
    mark_plan(made)
    return made


def mark_plan(plan: Plan) -> None:
    """Tell TorchDynamo, if it is in use, which sizes of the plan's tensors change from batch to batch."""
    if torch.compiler.is_compiling():
        return
    _mark(plan.layout, 0)
    _mark(plan.tables, 0)
    _mark(plan.tiles.all_heads, 0)
    for table in (plan.tiles.kv_partial, plan.tiles.kv_full, plan.tiles.q_partial, plan.tiles.q_full):
        mark_varying(table.count, 2)
        mark_varying(table.index, 2, 3)
    for x in plan.sandwiches:
        _mark(x.outer, 1)
        _mark(x.inner, 1)
    for x in (plan.mask, *plan.kernel_masks):
        _mark_mask(x)


def _mark(holder: object, dim: int) -> None:
    for value in vars(holder).values():
        if isinstance(value, Tensor):
            mark_varying(value, dim)


def _mark_mask(mask: m.Mask | None) -> None:
    """The last dimension of a mask's tensors is per token or per segment; only a shared matrix has fixed sizes."""
    if mask is None or (isinstance(mask, m.Dense) and mask.values.ndim == 2):
        return
    for value in vars(mask).values():
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, m.Mask):
                _mark_mask(x)
            elif isinstance(x, Tensor):
                mark_varying(x, x.ndim - 1)


def _check_plan(mask: object, score: object, normalizer: object, block_size: int, max_length: int | None) -> None:
    mask = check_node(MaskError, m.Mask, mask)
    score = None if score is None else check_node(ScoreError, s.Score, score)
    if not isinstance(normalizer, Normalizer):
        raise PlanError(explain_values("normalizer", "must be a flexjag normalizer", normalizer=normalizer))
    if not isinstance(block_size, int) or block_size < 16 or block_size & (block_size - 1):
        raise PlanError(explain_values("block_size", "must be a power of two of at least 16", block_size=block_size))
    if max_length is not None and (not isinstance(max_length, int) or max_length < 0):
        raise PlanError(explain_values("max_length", "must be an int of at least 0", max_length=max_length))
    heads = {h for h in (m.num_mask_heads(mask), s.num_score_heads(score)) if h is not None}
    if len(heads) > 1:
        raise ShapeError(explain_values("mask, score", "must agree on the number of heads", heads=sorted(heads)))


def _refined(
    tiles: TileList, x: Sandwich, tables: mods.RowTables, layout: Layout, block: int, wanted: bool | None
) -> TileList:
    if x.exact or wanted is False or not layout.num_q or not layout.num_kv:
        return tiles
    if wanted is None and tiles.row.shape[0] * block**2 > REFINE_LIMIT:
        return tiles
    if x.rest is None or functions.depends_on_head(x.rest, layout.device):
        return tiles  # one list of tiles has to do for all heads
    test = mods.mask_mod((mods.kernel_mask(x, tables),), None, tables, layout)
    zero = torch.zeros((), dtype=torch.int32, device=layout.device)
    return refine(tiles, lambda q, kv: test(zero, zero, q, kv), layout.num_q, layout.num_kv, block)
