"""Recipe: the immutable result of lowering a layout, a mask, a score and a normalizer. Backends run it.

:mod:`flexjag.lowering.outline` makes recipes; :class:`flexjag.Plan` is a recipe's public face.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from flexjag.algebra import masks as m
from flexjag.algebra import scores as s
from flexjag.algebra import user_functions as functions
from flexjag.algebra.facts import diagonal_align
from flexjag.algebra.node import BATCH, Axis, Node, check_node, is_integer, saturated
from flexjag.algebra.normalizers import Normalizer, StickBreaking, num_bias_heads
from flexjag.algebra.tree import check_held, replaced, walk
from flexjag.errors import MaskError, PlanError, ScoreError, ShapeError, explain_values
from flexjag.lowering import mods
from flexjag.lowering.layout import Layout, blocks
from flexjag.lowering.spans import Sandwich
from flexjag.lowering.tiles import Tiles, block_mask
from flexjag.offsets import mark_varying
from flexjag.upstream import holds_no_numbers

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Notes(dict[Hashable, Any]):
    """A plan's cache of lazily derived values; empty in pickles and copies of the plan."""

    def __reduce__(self) -> tuple[type[Notes], tuple[()]]:
        return Notes, ()


@dataclass(frozen=True, eq=False, repr=False)
class Recipe:
    """A lowered attention call, shared by all layers of a model for one batch.

    Attributes:
        layout: Segment, local position and key range of each token.
        mask: The mask as given.
        score: The score as given, or None.
        normalizer: The normalizer.
        heads: H if mask, score or normalizer hold tensors per head; else None.
        block_size: Tile size, in tokens.
        sandwiches: The mask's spans, one entry per distinct head mask.
        head_of: ``[H]`` int32, index into `sandwiches` for each query head; None if one serves all heads.
        tables: Per-row tensors that the mods read.
        kernel_masks: The masks that kernels evaluate, one per sandwich, padded like `tables`.
        kernel_score: The score that kernels evaluate, by row and padded like `tables`.
        made_tiles: Tile lists and tables; None if they were not made yet: backends with `needs_tiles` get them made.
        max_length: The given bound on segment lengths, in tokens, or None.
        reading: The tensors and values that the mask's functions read.
        notes: Backends' cache of values derived from layout and mask, shared by all layers.
        own_notes: Backends' cache of values derived from the score as well; new for each score.
        sample: ``(H, D, dtype, requires_grad)`` of the q given to the plan, if it had heads; else None.
    """

    layout: Layout
    mask: m.Mask
    score: s.Score | None
    normalizer: Normalizer
    heads: int | None
    block_size: int
    sandwiches: tuple[Sandwich, ...]
    head_of: Tensor | None
    tables: mods.RowTables
    kernel_masks: tuple[m.Mask, ...]
    kernel_score: s.Score | None
    made_tiles: Tiles | None
    max_length: int | None
    reading: functions.Reading
    notes: Notes
    own_notes: Notes
    sample: tuple[int, int, torch.dtype, bool] | None

    def with_score(self, score: s.Score | None) -> Self:
        """The same plan with another score: for one learned bias per layer. Layout, mask and tiles are shared.

        Args:
            score: The new score; None for none.

        Raises:
            ScoreError: If `score` is no score, or does not fit the layout.
            ShapeError: If its number of heads differs from the mask's or the normalizer's.

        >>> from flexjag.jagged import Jagged
        >>> from flexjag.api.plan import plan
        >>> x = Jagged.from_lengths(torch.zeros(6, 2, 16), [2, 4])
        >>> p = plan(x, mask=m.Causal())
        >>> p.with_score(s.Alibi.from_heads(2)).tiles is p.tiles
        True
        """
        score = None if score is None else check_node(ScoreError, s.Score, score)
        heads = check_heads(self.mask, score, self.normalizer)
        check_score(score, self.layout, self.tables)
        return self._rescored(of_this_batch(score), heads=heads)

    def _rescored(self, score: s.Score | None, **changes: Any) -> Self:
        kernel_score = mods.kernel_score(score, self.tables, self.layout)
        return replace(self, score=score, kernel_score=kernel_score, own_notes=Notes(), **changes)

    def dropping(self, dropped: s.Score) -> Self:
        """The same plan with what dropout rules out after its score; `dropped` fits the layout."""
        lowered = mods.kernel_score(dropped, self.tables, self.layout)
        if self.score is not None and self.kernel_score is not None and lowered is not None:
            dropped, lowered = self.score >> dropped, self.kernel_score >> lowered
        return replace(self, score=dropped, kernel_score=lowered, own_notes=Notes())

    def learning_in(self, dtype: torch.dtype) -> Self:
        """Widen the learned tensors of score and normalizer to at least `dtype`. Returns itself if nothing changes."""
        score = None if self.score is None else functions.learning_in(self.score, dtype, self.place)
        normalizer = functions.learning_in(self.normalizer, dtype, self.place)
        if normalizer is not self.normalizer:
            return self._rescored(score, normalizer=normalizer)
        return self if score is self.score else self._rescored(score)

    def frozen(self) -> Self:
        """Bind global names in the plan's functions to their current values, for a backward that calls them again."""
        score = None if self.score is None else functions.frozen(self.score, with_globals=True)
        masks = tuple([functions.frozen(x, with_globals=True) for x in self.kernel_masks])
        plan = self if score is self.score else self._rescored(score)
        same = all(x is y for x, y in zip(masks, self.kernel_masks, strict=True))
        return plan if same else replace(plan, kernel_masks=masks)

    def place(self) -> functions.Place | None:
        """Indices ``(b, h, q, kv)`` at which users' functions can be tried; None if there are none."""
        return place_in(self.layout, self.tables)

    @property
    def tiles(self) -> Tiles:
        """Tile lists and tables.

        Raises:
            PlanError: In a backend whose record does not say that it reads them.
        """
        if self.made_tiles is None:
            raise PlanError(explain_values("tiles", "are made for backends whose record says needs_tiles=True"))
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

        >>> from flexjag.jagged import Jagged
        >>> from flexjag.api.plan import plan
        >>> x = Jagged.from_lengths(torch.zeros(300, 1, 16), [100, 200])
        >>> plan(x, mask=m.Causal()).block_mask.shape
        (1, 1, 300, 300)
        """
        return block_mask(self.tiles, self.mask_mod, self.layout.num_q, self.layout.num_kv, self.block_size)

    @property
    def exact(self) -> bool:
        """True if every head's mask equals its spans, so that no predicate is left to evaluate."""
        return all(x.exact for x in self.sandwiches)

    @property
    def num_tiles(self) -> int:
        """Number of non-empty tiles of the union of all heads' masks. Reads the device."""
        return int(self.tiles.all_heads.live.count_nonzero())  # sum() would copy to int64

    @property
    def num_full(self) -> int:
        """Number of tiles that need no masking, of the union of all heads' masks. Reads the device."""
        return int(self.tiles.all_heads.full.count_nonzero())

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of tile rows and tile columns of the packed score matrix."""
        return blocks(self.layout.num_q, self.block_size), blocks(self.layout.num_kv, self.block_size)

    @property
    def density(self) -> float:
        """Fraction of the packed T_q × T_kv score matrix that lies in non-empty tiles."""
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

    def to_dense(self, heads: int | None = None) -> Tensor:
        """The mask as bool ``[T_q, T_kv]``, or ``[H, T_q, T_kv]`` if `heads` is given. For tests and plots.

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

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.mask!r}, score={self.score!r}, segments={self.layout.num_segments}, "
            f"tokens={self.layout.num_q}x{self.layout.num_kv}, block_size={self.block_size})"
        )


def place_in(layout: Layout, t: mods.RowTables) -> functions.Place | None:
    """Indices ``(b, h, q, kv)`` of an existing pair, at which users' functions can be tried.

    None if no pair exists, or in a graph. Where the host may not read the offsets and no pair exists, all are 0.
    """
    if layout.num_q == 0 or layout.num_kv == 0 or holds_no_numbers(layout.q_offsets):
        return None
    if layout.may_look and not bool((layout.kv_end > layout.kv_start).any()):
        return None
    zero = t.q_pos.new_zeros(())
    return t.segment[0], zero, t.q_pos[0], zero.clone()


def check_reading(recipe: Recipe) -> None:
    """Check that a mask's functions read what they read when the recipe was made; not in a graph.

    Raises:
        PlanError: If they read something else.
    """
    if not torch.compiler.is_compiling() and (change := recipe.reading.change()) is not None:
        raise PlanError(explain_values("plan", f"{change} that its mask's function reads; make the plan anew"))


def check_fit(error: type[ValueError], node: Node | None, layout: Layout) -> None:
    """Check that the tensors of a mask, score or normalizer fit a layout's sizes and device; metadata only.

    Raises:
        error: If one has another length or lies on another device.
    """
    sizes: dict[Axis, int] = {
        "query token": layout.num_q,
        "key token": layout.num_kv,
        "segment": layout.num_segments,
    }
    check_held(error, node, sizes, layout.device)


def of_this_batch(score: s.Score | None) -> s.Score | None:
    """Copy a score's tensors per token and per segment into the plan; integers become int64.

    These belong to the batch, as the mask does; tables and matrices of pairs, which may learn, stay the caller's.
    Differences of narrower integers would wrap.
    """

    def own(x: Tensor) -> Tensor:
        wide = saturated(x) if is_integer(x) else x
        wide = wide.clone() if wide is x and not holds_no_numbers(x) else wide
        mark_varying(wide, wide.ndim - 1)
        return wide

    return None if score is None else replaced(score, own, [axis for axis in BATCH if axis != "pair"])


def check_score(score: s.Score | None, layout: Layout, t: mods.RowTables) -> None:
    """Check that a score's tensors fit a layout, and call its functions once.

    Raises:
        ScoreError: If a tensor does not fit, or a function fails.
    """
    if score is None:
        return
    check_fit(ScoreError, score, layout)
    if not torch.compiler.is_compiling() and any(isinstance(x, s.ScoreMod) for x in walk(score)):
        functions.check_functions(score, place_in(layout, t))


def check_arguments(
    mask: object, score: object, normalizer: object, block_size: int, max_length: int | None
) -> int | None:
    """Check the arguments of a plan that need no layout. Returns the number of heads, as :func:`check_heads` does.

    Raises:
        MaskError: If `mask` is no mask.
        ScoreError: If `score` is no score.
        PlanError: If `normalizer` is no normalizer, `block_size` is no power of two of at least 16, or `max_length` is
            neither None nor an int of at least 0.
        ShapeError: If mask, score and normalizer are for different numbers of heads.
    """
    mask = check_node(MaskError, m.Mask, mask)
    score = None if score is None else check_node(ScoreError, s.Score, score)
    if not isinstance(normalizer, Normalizer):
        raise PlanError(explain_values("normalizer", "must be a flexjag normalizer", normalizer=normalizer))
    if not isinstance(block_size, int) or block_size < 16 or block_size & (block_size - 1):
        raise PlanError(explain_values("block_size", "must be a power of two of at least 16", block_size=block_size))
    if max_length is not None and (not isinstance(max_length, int) or max_length < 0):
        raise PlanError(explain_values("max_length", "must be an int of at least 0", max_length=max_length))
    return check_heads(mask, score, normalizer)


def check_heads(mask: m.Mask, score: s.Score | None, normalizer: Normalizer) -> int | None:
    """The number of heads for which mask, score and normalizer hold tensors; None if they work for any number.

    Raises:
        ShapeError: If their numbers of heads differ.
    """
    counts = m.num_mask_heads(mask), s.num_score_heads(score), num_bias_heads(normalizer)
    heads = sorted({h for h in counts if h is not None})
    if len(heads) > 1:
        raise ShapeError(explain_values("mask, score", "must agree on the number of heads", heads=heads))
    return heads[0] if heads else None


def check_normalizer(layout: Layout, mask: m.Mask, normalizer: Normalizer) -> None:
    """Check that a normalizer supports a mask and a layout; metadata only.

    Raises:
        MaskError: If stick-breaking meets a mask that may allow later keys or, in cross-attention, has diagonals of
            both alignments.
        PlanError: If ``remainder=True`` in cross-attention, where a query has no value of its own.
    """
    if isinstance(normalizer, StickBreaking):
        diagonal_align(mask, layout.is_self)
        if normalizer.remainder and not layout.is_self:
            rule = "remainder=True adds each query's own value, so k and v need the very offsets of q: q.with_values"
            raise PlanError(explain_values("normalizer", rule, normalizer=normalizer))
