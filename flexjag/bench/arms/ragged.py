"""Every ragged op in three implementations: with flexjag, by padding, and with FBGEMM where it has the op.

Inputs, outputs and gradients are packed in all three. Padding writes the values into a padded tensor, computes there
and reads the result back. Whatever depends on the lengths alone (indices, masks, offsets of matrices) is made before
the timing starts, for all arms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flexjag import ops
from flexjag.bench.measuring.lengths import meta_lengths
from flexjag.bench.measuring.padded import Padding
from flexjag.jagged import Jagged
from flexjag.ops.packed import offsets_of

FLEXJAG = "flexjag"
PADDED = "padding"
PLAIN = "flexjag, plain torch"
"""flexjag without the kernels in C++, as where there is no compiler."""
SDPA = "padding, SDPA"
FBGEMM = "FBGEMM"
FAR = -1e9  # a score with weight 0; unlike -inf, a column of nothing else does not give NaN


@dataclass(frozen=True)
class RaggedSizes:
    """Sizes of a case of the ragged ops.

    Attributes:
        segments: Number of segments S.
        longest: Upper bound N of the lengths, exclusive.
        features: Features per token D.
        queries: Queries per segment M.
        sparsity: Parameter s of :func:`flexjag.bench.measuring.lengths.meta_lengths`.
    """

    segments: int
    longest: int
    features: int
    queries: int
    sparsity: float = 0.5


class RaggedBatch(Padding):
    """A batch of Meta's lengths, with the indices and offsets that the arms of ops need, each computed once.

    Args:
        sizes: Sizes of the batch.
        device: ``"cpu"`` or ``"cuda"``.
        seed: Random seed of lengths and values.
    """

    def __init__(self, sizes: RaggedSizes, device: str, seed: int) -> None:
        lengths = meta_lengths(sizes.segments, sizes.longest, sizes.sparsity, seed)
        super().__init__(lengths, device, sizes.longest)
        self.n, self.sizes, self.device, self.seed = lengths, sizes, device, seed
        self.tokens = sum(lengths)
        self.lengths = torch.tensor(lengths, device=device)
        self.offsets = offsets_of(self.lengths)

    @cached_property
    def squares(self) -> Tensor:
        """Offsets ``[S+1]`` of one packed n × n matrix per segment."""
        return offsets_of(self.lengths.square())

    @cached_property
    def entry(self) -> Tensor:
        """Index ``[Σ n²]`` of each packed matrix entry in the flattened ``[S, N, N]``."""
        size = self.longest
        place = torch.arange(size * size, device=self.device).view(size, size)
        return torch.cat([place[:n, :n].flatten() + s * size * size for s, n in enumerate(self.n)])

    @cached_property
    def chosen(self) -> Tensor:
        """Indices ``[S]`` of segments, drawn with replacement."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(len(self.n), (len(self.n),), generator=generator).to(self.device)

    @cached_property
    def chosen_row(self) -> Tensor:
        """Row of each token of the chosen segments, packed back to back, in the flattened ``[S, N]``."""
        return self.rows_of([self.n[s] for s in self.chosen.tolist()], self.longest)

    @cached_property
    def joined_row(self) -> Tensor:
        """Row of each token of two batches, concatenated segment by segment, in the flattened ``[S, 2N]``."""
        size = self.longest
        firsts, seconds = (
            self.rows_of(self.n, 2 * size).split(self.n),
            (self.rows_of(self.n, 2 * size) + size).split(self.n),
        )
        return torch.cat([row for pair in zip(firsts, seconds, strict=True) for row in pair])

    @cached_property
    def half(self) -> Tensor:
        """Positions ``[S]`` at which segments are split: half their lengths, rounded down."""
        return self.lengths // 2

    @cached_property
    def half_rows(self) -> tuple[Tensor, Tensor]:
        """Rows, in the flattened ``[S, N]``, of the tokens before the split and from it on."""
        cuts = [row.tensor_split([n // 2]) for row, n in zip(self.index.split(self.n), self.n, strict=True)]
        return torch.cat([a for a, _ in cuts]), torch.cat([b for _, b in cuts])

    def rows_of(self, lengths: list[int], size: int) -> Tensor:
        """Row of each token of segments with these lengths in the flattened ``[S, size]``."""
        return torch.cat([torch.arange(n, device=self.device) + s * size for s, n in enumerate(lengths)])

    def jagged(self, values: Tensor) -> Jagged:
        """The packed values ``[T, ...]`` as a Jagged with this batch's offsets."""
        return Jagged(values, self.offsets)

    def pad_matrices(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Pad packed matrices ``[Σ n²]`` to ``[S, N, N]`` with `fill`."""
        shape = len(self.n), self.longest, self.longest
        return values.new_full(shape, fill).flatten().index_copy(0, self.entry, values).view(shape)

    def unpad_matrices(self, dense: Tensor) -> Tensor:
        """Pack padded matrices ``[S, N, N]`` to ``[Σ n²]``."""
        return dense.flatten().index_select(0, self.entry)

    def operands(self, op: Op) -> list[Tensor]:
        """An op's operands: standard normal float32 tensors in the op's order."""
        s, n, d, m = len(self.n), self.longest, self.sizes.features, self.sizes.queries
        shapes = {
            "x": (self.tokens, d),
            "y": (self.tokens, d),
            "p": (int(self.squares[-1]),),
            "dense": (s, n, d),
            "row": (s, d),
            "matrix": (s, d, d),
            "query": (s, m, d),
            "bias": (s, n, m),
            "gain": (d,),
            "shift": (d,),
        }
        generator = torch.Generator(self.device).manual_seed(self.seed)
        return [torch.randn(shapes[name], generator=generator, device=self.device) for name in op.operands]


Call = Callable[..., Any]
"""Function of a :class:`RaggedBatch` and the operands that returns a tensor or several."""


@dataclass(frozen=True)
class Op:
    """The implementations of one ragged op.

    Attributes:
        operands: Names of the differentiable operands, as in :meth:`RaggedBatch.operands`.
        flexjag: Implementation with flexjag.
        padded: Implementation by padding.
        fbgemm: Implementation with FBGEMM, whose operators are its first argument; None if FBGEMM lacks the op.
        name_there: Name of FBGEMM's operator.
        more: Further implementations by arm name.
    """

    operands: tuple[str, ...]
    flexjag: Call
    padded: Call
    fbgemm: Call | None = None
    name_there: str | None = None
    more: Mapping[str, Call] = field(default_factory=dict)


def _on_packed(op: Callable[..., Jagged], *more: Any, **keywords: Any) -> Call:
    return lambda b, x, *rest: op(b.jagged(x), *rest, *more, **keywords).values


def _reduced(op: Callable[[Jagged], Tensor]) -> Call:
    return lambda b, x: op(b.jagged(x))


def _on_padded(dense: Callable[..., Tensor], fill: float = 0.0) -> Call:
    """An implementation that pads the first operand, applies `dense` and packs the result."""
    return lambda b, x, *rest: b.unpad(dense(b.pad(x, fill), *rest))


def _extreme(reduce: Callable[..., Tensor], fill: float) -> Call:
    def padded(b: RaggedBatch, x: Tensor) -> Tensor:
        return torch.where(b.lengths[:, None] > 0, reduce(b.pad(x, fill), 1), 0.0)

    return padded


def _pad(b: RaggedBatch, x: Tensor) -> Tensor:
    """Pad from the lengths alone, as the op itself has to: the prepared index is not used."""
    return x.new_zeros(b.segments * b.longest, x.shape[1]).index_copy_(0, _kept(b), x).unflatten(0, (-1, b.longest))


def _unpad(b: RaggedBatch, dense: Tensor) -> Tensor:
    return dense.flatten(0, 1).index_select(0, _kept(b))


def _kept(b: RaggedBatch) -> Tensor:
    """Rows ``[T]`` of the flattened padded batch that hold tokens, computed from the lengths."""
    return (torch.arange(b.longest, device=b.device) < b.lengths[:, None]).flatten().nonzero()[:, 0]


def _mean(b: RaggedBatch, x: Tensor) -> Tensor:
    return b.pad(x).sum(1) / b.lengths.clamp(min=1)[:, None]


def _jagged_out(b: RaggedBatch, x: Tensor, y: Tensor) -> Tensor:
    return b.unpad_matrices(b.pad(x) @ b.pad(y).transpose(1, 2))


def _array(b: RaggedBatch, p: Tensor, y: Tensor) -> Tensor:
    return b.unpad(b.pad_matrices(p) @ b.pad(y))


def _split(b: RaggedBatch, x: Tensor) -> tuple[Tensor, ...]:
    flat = b.pad(x).flatten(0, 1)
    return tuple(flat.index_select(0, row) for row in b.half_rows)


def _concat(b: RaggedBatch, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([b.pad(x), b.pad(y)], 1).flatten(0, 1).index_select(0, b.joined_row)


def _norm_of_segment(center: bool) -> Call:
    """Layer norm (`center`) or RMS norm with statistics over all features of all tokens of a segment, by padding."""

    def padded(b: RaggedBatch, x: Tensor, gain: Tensor, *shift: Tensor) -> Tensor:
        values, inside = b.pad(x), b.real[:, :, None]
        count = (b.lengths * x.shape[1]).clamp(min=1)[:, None, None]
        if center:
            values = (values - values.sum((1, 2), keepdim=True) / count) * inside
        spread = values.square().sum((1, 2), keepdim=True) / count
        values = values * torch.rsqrt(spread + (1e-5 if center else 1e-6)) * gain
        return b.unpad(values + shift[0] if shift else values)

    return padded


def _attention(b: RaggedBatch, query: Tensor, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    scores = torch.baddbmm(bias.transpose(1, 2), query, b.pad(x).transpose(1, 2))
    weights = scores.masked_fill(~b.real[:, None], FAR).softmax(2)
    return (weights * b.real[:, None]) @ b.pad(y)


def _sdpa(b: RaggedBatch, query: Tensor, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    mask = bias.transpose(1, 2).masked_fill(~b.real[:, None], FAR)[:, None]
    heads = (t[:, None] for t in (query, b.pad(x), b.pad(y)))
    return functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=1.0)[:, 0]


def _sides(b: RaggedBatch) -> tuple[Tensor, Tensor]:
    return b.lengths, b.offsets


def _matrix_side(b: RaggedBatch) -> tuple[Tensor, Tensor]:
    return b.lengths.square(), b.squares


OPS: dict[str, Op] = {
    "jagged_softmax": Op(
        ("x",),
        _on_packed(ops.jagged_softmax),
        _on_padded(lambda x: x.softmax(1), FAR),
        lambda f, b, x: f.jagged_softmax(x, b.offsets, b.longest)[0],
        "jagged_softmax",
    ),
    "jagged_dense_bmm": Op(
        ("x", "matrix"),
        _on_packed(ops.jagged_dense_bmm),
        _on_padded(torch.bmm),
        lambda f, b, x, y: f.jagged_dense_bmm(x, b.offsets, y, b.longest)[0],
        "jagged_dense_bmm",
    ),
    "jagged_jagged_bmm": Op(
        ("x", "y"),
        lambda b, x, y: ops.jagged_jagged_bmm(b.jagged(x), b.jagged(y)),
        lambda b, x, y: b.pad(x).transpose(1, 2) @ b.pad(y),
        lambda f, b, x, y: f.jagged_jagged_bmm(x, y, b.offsets, b.longest),
        "jagged_jagged_bmm",
    ),
    "jagged_jagged_bmm_jagged_out": Op(
        ("x", "y"),
        lambda b, x, y: ops.jagged_jagged_bmm_jagged_out(b.jagged(x), b.jagged(y)).values,
        _jagged_out,
        lambda f, b, x, y: f.sll_jagged_jagged_bmm_jagged_out(
            x, y, *_sides(b), *_sides(b), *_matrix_side(b), b.longest, False
        ),
        "sll_jagged_jagged_bmm_jagged_out",
    ),
    "array_jagged_bmm": Op(
        ("p", "y"),
        lambda b, p, y: ops.array_jagged_bmm(Jagged(p, b.squares), b.jagged(y)).values,
        _array,
        lambda f, b, p, y: f.sll_array_jagged_bmm_jagged_out(
            p, y, *_matrix_side(b), *_sides(b), *_sides(b), b.longest, False
        ),
        "sll_array_jagged_bmm_jagged_out",
    ),
    "jagged2_softmax": Op(
        ("p",),
        lambda b, p: ops.jagged2_softmax(Jagged(p, b.squares), b.offsets).values,
        lambda b, p: b.unpad_matrices(b.pad_matrices(p, FAR).softmax(2)),
        lambda f, b, p: f.sll_jagged2_softmax(p, b.offsets, b.squares, b.longest, False),
        "sll_jagged2_softmax",
    ),
    "jagged_dense_elementwise_add": Op(
        ("x", "dense"),
        _on_packed(ops.jagged_dense_elementwise_add),
        _on_padded(torch.add),
        lambda f, b, x, y: f.jagged_dense_elementwise_add_jagged_output(x, [b.offsets], y)[0],
        "jagged_dense_elementwise_add_jagged_output",
    ),
    "jagged_dense_elementwise_mul": Op(
        ("x", "dense"),
        _on_packed(ops.jagged_dense_elementwise_mul),
        _on_padded(torch.mul),
        lambda f, b, x, y: f.jagged_dense_elementwise_mul(x, [b.offsets], y)[0],
        "jagged_dense_elementwise_mul",
    ),
    "jagged_to_padded_dense": Op(
        ("x",),
        lambda b, x: ops.jagged_to_padded_dense(b.jagged(x), b.longest),
        _pad,
        lambda f, b, x: f.jagged_to_padded_dense(x, [b.offsets], [b.longest], 0.0),
        "jagged_to_padded_dense",
    ),
    "dense_to_jagged": Op(
        ("dense",),
        lambda b, dense: ops.dense_to_jagged(dense, b.offsets, total=b.tokens).values,
        _unpad,
        lambda f, b, dense: f.dense_to_jagged(dense, [b.offsets], b.tokens)[0],
        "dense_to_jagged",
    ),
    "jagged_index_select": Op(
        ("x",),
        lambda b, x: ops.jagged_index_select(b.jagged(x), b.chosen).values,
        lambda b, x: b.pad(x).index_select(0, b.chosen).flatten(0, 1).index_select(0, b.chosen_row),
        lambda f, b, x: f.jagged_index_select(x, b.lengths, b.chosen)[0],
        "jagged_index_select",
    ),
    "jagged_concat": Op(("x", "y"), lambda b, x, y: ops.jagged_concat([b.jagged(x), b.jagged(y)]).values, _concat),
    "jagged_split": Op(
        ("x",), lambda b, x: tuple(piece.values for piece in ops.jagged_split(b.jagged(x), [b.half])), _split
    ),
    "segment_broadcast": Op(
        ("row",),
        lambda b, row: ops.segment_broadcast(row, b.jagged(b.index)).values,
        lambda b, row: b.unpad(row[:, None].expand(-1, b.longest, -1)),
    ),
    "segment_sum": Op(("x",), _reduced(ops.segment_sum), lambda b, x: b.pad(x).sum(1)),
    "segment_mean": Op(("x",), _reduced(ops.segment_mean), _mean),
    "segment_max": Op(("x",), _reduced(ops.segment_max), _extreme(torch.amax, -torch.inf)),
    "segment_min": Op(("x",), _reduced(ops.segment_min), _extreme(torch.amin, torch.inf)),
    "jagged_layer_norm": Op(
        ("x", "gain", "shift"),
        _on_packed(ops.jagged_layer_norm),
        _on_padded(lambda x, gain, shift: functional.layer_norm(x, gain.shape, gain, shift)),
    ),
    "jagged_layer_norm, per segment": Op(
        ("x", "gain", "shift"), _on_packed(ops.jagged_layer_norm, per="segment"), _norm_of_segment(center=True)
    ),
    "jagged_rms_norm": Op(
        ("x", "gain"),
        _on_packed(ops.jagged_rms_norm),
        _on_padded(lambda x, gain: functional.rms_norm(x, gain.shape, gain, 1e-6)),
    ),
    "jagged_rms_norm, per segment": Op(
        ("x", "gain"), _on_packed(ops.jagged_rms_norm, per="segment"), _norm_of_segment(center=False)
    ),
    "jagged_dense_attention": Op(
        ("query", "x", "y", "bias"),
        lambda b, query, x, y, bias: ops.jagged_dense_attention(query, b.jagged(x), b.jagged(y), bias),
        _attention,
        lambda f, b, query, x, y, bias: f.sll_jagged_dense_flash_attention(
            x, query.transpose(1, 2), y, bias, b.offsets, b.longest, False
        ),
        "sll_jagged_dense_flash_attention",
        {SDPA: _sdpa},
    ),
}
