"""Every FBGEMM function beside a plain loop over segments: the table that its tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import fbgemm_loops as loops
import torch
from fbgemm_loops import Arguments, Batch, D, E, H, M
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Case:
    """One way to call one function.

    Attributes:
        shapes: Those of the operands that need gradients; letters are sizes of the batch.
        run: The call, on a namespace with FBGEMM's functions, the arguments and the operands. Returns a tensor or
            several.
        loop: The same by a loop, on the batch and the operands.
        oracle: "" if FBGEMM's CPU function has no gradient, "same" if it has, "short" if its gradient is that of the
            result only where no segment is cut, "only short" if it has neither result nor gradient elsewhere,
            "none" if it has no CPU function.
        written: Whether FBGEMM writes what stands at cut tokens.
        positive: Whether N must not be 0.
    """

    shapes: tuple[tuple[int | str, ...], ...]
    run: Callable[..., Any]
    loop: Callable[..., Any]
    oracle: str = "same"
    written: bool = True
    positive: bool = False

    def operands(self, b: Batch, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
        """Uniform in [-1, 1], so that tolerances follow from the number of terms."""
        generator = torch.Generator().manual_seed(seed)
        sizes = b.sizes()
        shapes = [[n if isinstance(n, int) else sizes[n] for n in shape] for shape in self.shapes]
        found = [torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1 for shape in shapes]
        return [x.to(dtype).requires_grad_() for x in found]


def _dense(*inner: int | str) -> tuple[int | str, ...]:
    return ("S", "N", *inner)


PACKED = ("T", D)
SQUARE = torch.rand(64, 64, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
"""Over every segment of the tests."""


def _xyz(b: Arguments) -> tuple[Tensor, ...]:
    return (b.n, b.offsets, b.n, b.offsets, *b.squares)


def _zyy(b: Arguments) -> tuple[Tensor, ...]:
    return (*b.squares, b.n, b.offsets, b.n, b.offsets)


def _thirds(x: Tensor) -> Tensor:
    """0, 1, 2 and again, one per row."""
    return torch.arange(x.shape[0]) % 3


def _keyed(f: Any, b: Arguments, x: Tensor, w: Tensor) -> list[Tensor]:
    """Two keys: all segments, and the same lengths backwards."""
    lengths = b.keys.flatten()
    offsets = f.asynchronous_complete_cumsum(lengths)
    values, weights = torch.cat([x, x * 3]), torch.cat([w, w * 3])
    out = f.keyed_jagged_index_select_dim1(values, lengths, offsets, b.chosen, b.n.shape[0], weights)
    return [out[0], out[2]]


CASES: dict[str, Case] = {
    "jagged_to_padded_dense": Case(
        (PACKED,),
        lambda f, b, x: f.jagged_to_padded_dense(x, [b.offsets], [b.size], -1.5),
        lambda b, x: loops.padded(b, x, -1.5),
    ),
    "jagged_to_padded_dense, [T]": Case(
        (("T",),), lambda f, b, x: f.jagged_to_padded_dense(x, [b.offsets], [b.size]), loops.padded
    ),
    "jagged_to_padded_dense, two": Case(
        (("U", D),),
        lambda f, b, x: f.jagged_to_padded_dense(x, b.two, [b.size, 2], -1.5),
        lambda b, x: loops.padded_two(b, x, -1.5),
    ),
    "jagged_2d_to_dense": Case((PACKED,), lambda f, b, x: f.jagged_2d_to_dense(x, b.offsets, b.size), loops.padded),
    "jagged_1d_to_dense": Case(
        (("T",),),
        lambda f, b, x: f.jagged_1d_to_dense(x, b.offsets, b.size, -2),
        lambda b, x: loops.padded(b, x, -2.0),
        positive=True,
    ),
    "stacked_jagged_1d_to_dense": Case(
        (("T",),),
        lambda f, b, x: f.stacked_jagged_1d_to_dense(
            torch.cat([x, x * 3]), b.keys, [0, b.total, 2 * b.total], [b.size, 3], -2
        ),
        lambda b, x: loops.stacked(b, torch.cat([x, x * 3]), -2.0),
        oracle="",
        positive=True,
    ),
    "stacked_jagged_2d_to_dense": Case(
        (PACKED,),
        lambda f, b, x: f.stacked_jagged_2d_to_dense(
            torch.cat([x, x * 3]), b.keys, [0, b.total, 2 * b.total], [b.size, 3], -2
        ),
        lambda b, x: loops.stacked(b, torch.cat([x, x * 3]), -2.0),
    ),
    "dense_to_jagged": Case((_dense(D),), lambda f, b, y: f.dense_to_jagged(y, [b.offsets])[0], loops.packed),
    "dense_to_jagged, total": Case(
        (_dense(D),), lambda f, b, y: f.dense_to_jagged(y, [b.offsets], b.total)[0], loops.packed
    ),
    "dense_to_jagged, large total": Case(
        (_dense(D),),
        lambda f, b, y: f.dense_to_jagged(y, [b.offsets], b.total + 3)[0],
        lambda b, y: pad(loops.packed(b, y), (0, 0, 0, 3)),
    ),
    "dense_to_jagged, two": Case((("S", "N", 2, D),), lambda f, b, y: f.dense_to_jagged(y, b.two)[0], loops.packed_two),
    "jagged_dense_elementwise_add": Case(
        (PACKED, _dense(D)),
        lambda f, b, x, y: f.jagged_dense_elementwise_add(x, [b.offsets], y),
        lambda b, x, y: loops.padded(b, x) + y,
    ),
    "jagged_dense_elementwise_add, two": Case(
        (("U", D), ("S", "N", 2, D)),
        lambda f, b, x, y: f.jagged_dense_elementwise_add(x, b.two, y),
        lambda b, x, y: loops.padded_two(b, x) + y,
    ),
    "jagged_dense_elementwise_add_jagged_output": Case(
        (PACKED, _dense(D)),
        lambda f, b, x, y: f.jagged_dense_elementwise_add_jagged_output(x, [b.offsets], y)[0],
        lambda b, x, y: x + loops.packed(b, y),
    ),
    "jagged_dense_elementwise_add_jagged_output, two": Case(
        (("U", D), ("S", "N", 2, D)),
        lambda f, b, x, y: f.jagged_dense_elementwise_add_jagged_output(x, b.two, y)[0],
        lambda b, x, y: x + loops.packed_two(b, y),
    ),
    "jagged_dense_dense_elementwise_add_jagged_output": Case(
        (PACKED, _dense(D), _dense(D)),
        lambda f, b, x, y, z: f.jagged_dense_dense_elementwise_add_jagged_output(x, [b.offsets], y, z)[0],
        lambda b, x, y, z: x + loops.packed(b, y) + loops.packed(b, z),
    ),
    "jagged_dense_dense_elementwise_add_jagged_output, two": Case(
        (("U", D), ("S", "N", 2, D), ("S", "N", 2, D)),
        lambda f, b, x, y, z: f.jagged_dense_dense_elementwise_add_jagged_output(x, b.two, y, z)[0],
        lambda b, x, y, z: x + loops.packed_two(b, y) + loops.packed_two(b, z),
    ),
    "jagged_dense_elementwise_mul": Case(
        (PACKED, _dense(D)),
        lambda f, b, x, y: f.jagged_dense_elementwise_mul(x, [b.offsets], y)[0],
        lambda b, x, y: x * loops.packed(b, y),
    ),
    "jagged_dense_elementwise_mul, two": Case(
        (("U", D), ("S", "N", 2, D)),
        lambda f, b, x, y: f.jagged_dense_elementwise_mul(x, b.two, y)[0],
        lambda b, x, y: x * loops.packed_two(b, y),
    ),
    "batched_dense_vec_jagged_2d_mul": Case(
        (("R", "N"), ("T", H * E)),
        lambda f, b, v, a: f.batched_dense_vec_jagged_2d_mul(v, a, b.offsets),
        loops.vectors,
    ),
    "jagged_softmax": Case(
        (PACKED,), lambda f, b, x: f.jagged_softmax(x, b.offsets, b.size)[0], loops.softmax, written=False
    ),
    "jagged_jagged_bmm": Case(
        (PACKED, ("T", E)), lambda f, b, x, y: f.jagged_jagged_bmm(x, y, b.offsets, b.size), loops.gram
    ),
    "jagged_dense_bmm": Case(
        (PACKED, ("S", D, E)), lambda f, b, x, y: f.jagged_dense_bmm(x, b.offsets, y, b.size)[0], loops.times_dense
    ),
    "jagged_index_select": Case((PACKED,), lambda f, b, x: f.jagged_index_select(x, b.n, b.chosen)[0], loops.selected),
    "jagged_index_select, total": Case(
        (PACKED,),
        lambda f, b, x: f.jagged_index_select(x, b.n, b.chosen, b.chosen_total)[0],
        loops.selected,
    ),
    "jagged_index_add_2d_forward": Case(
        (("C", D),),
        lambda f, b, y: f.jagged_index_add_2d_forward(
            y, b.chosen, b.n[b.chosen].cumsum(0), b.n.cumsum(0), y.shape[0], b.total
        ),
        loops.added,
        oracle="",
    ),
    "keyed_jagged_index_select_dim1": Case(
        (("T",), ("T",)),
        _keyed,
        lambda b, x, w: (loops.selected_keys(b, x, x * 3), loops.selected_keys(b, w, w * 3)),
        oracle="none",
    ),
    "jagged_slice": Case(
        (("T",),),
        lambda f, b, x: f.jagged_slice(x, b.n.long(), b.n.long() // 2, b.size)[0],
        loops.sliced,
    ),
    "jagged_1d_to_truncated_values": Case(
        (("T",),), lambda f, b, x: f.jagged_1d_to_truncated_values(x, b.n, b.size), loops.truncated, oracle=""
    ),
    "masked_select_jagged_1d": Case(
        (("T",),),
        lambda f, b, x: f.masked_select_jagged_1d(x, b.n, _thirds(x) > 0)[0],
        lambda b, x: x[_thirds(x) > 0],
        oracle="",
    ),
    "jagged_acc_weights_and_counts": Case(
        (("T",),),
        lambda f, b, w: f.jagged_acc_weights_and_counts(w, _thirds(w), 4),
        lambda b, w: loops.accumulated(b, w, _thirds(w), 4),
        oracle="",
    ),
    "pack_segments": Case((PACKED,), lambda f, b, x: f.pack_segments(x, b.n, b.size), loops.padded, oracle="short"),
    "pack_segments_v2": Case(
        (PACKED,),
        # Clamped, as infinity would be no bound for differences.
        lambda f, b, x: f.pack_segments_v2(x, b.n, b.size, True)[0].clamp(min=-9),
        lambda b, x: loops.padded(b, x, -9.0),
        oracle="short",
    ),
    "sll_jagged_dense_bmm": Case(
        (PACKED, ("S", D, E)),
        lambda f, b, x, y: f.sll_jagged_dense_bmm(x, y, b.offsets, b.size, True),
        loops.times_dense,
    ),
    "sll_jagged_jagged_bmm": Case(
        (PACKED, ("T", E)), lambda f, b, x, y: f.sll_jagged_jagged_bmm(x, y, b.offsets, b.size, True), loops.gram
    ),
    "sll_jagged_softmax": Case(
        (PACKED,), lambda f, b, x: f.sll_jagged_softmax(x, b.offsets, b.size), loops.softmax, written=False
    ),
    "sll_jagged_dense_elementwise_add": Case(
        (PACKED, _dense(D)),
        lambda f, b, x, y: f.sll_jagged_dense_elementwise_add(x, b.offsets, y, b.size),
        lambda b, x, y: x + loops.packed(b, y),
    ),
    "sll_dense_jagged_cat_jagged_out": Case(
        (("S",), ("T",)),
        lambda f, b, a, x: f.sll_dense_jagged_cat_jagged_out(a, x, b.offsets, b.size)[0],
        loops.concatenated,
    ),
    "sll_jagged_self_substraction_jagged_out": Case(
        (("T",),),
        lambda f, b, a: f.sll_jagged_self_substraction_jagged_out(a, b.offsets, b.fewer, b.size),
        loops.differences,
    ),
    "sll_jagged2_to_padded_dense": Case(
        (("P",),),
        lambda f, b, p: f.sll_jagged2_to_padded_dense(p, b.squares[1], b.size, -1.5),
        loops.squares_padded,
        oracle="only short",
    ),
    "sll_jagged_dense_elementwise_mul_jagged_out": Case(
        (("P",),),
        lambda f, b, p: f.sll_jagged_dense_elementwise_mul_jagged_out(p, SQUARE.to(p.dtype), b.n, b.squares[1], b.size),
        lambda b, p: loops.masked(b, p, SQUARE.to(p.dtype)),
    ),
    "sll_jagged_dense_elementwise_mul_jagged_out, small": Case(
        (("P",),),
        lambda f, b, p: f.sll_jagged_dense_elementwise_mul_jagged_out(
            p, SQUARE[: b.size, : b.size].to(p.dtype), b.n, b.squares[1], b.size
        ),
        lambda b, p: loops.masked(b, p, SQUARE[: b.size, : b.size].to(p.dtype)),
        oracle="only short",
    ),
    "sll_jagged2_softmax": Case(
        (("P",),),
        lambda f, b, p: f.sll_jagged2_softmax(p, b.offsets, b.squares[1], b.size, False),
        lambda b, p: loops.matrix_softmax(b, p, 1),
    ),
    "sll_jagged2_softmax, transposed": Case(
        (("P",),),
        lambda f, b, p: f.sll_jagged2_softmax(p, b.offsets, b.squares[1], b.size, True),
        lambda b, p: loops.matrix_softmax(b, p, 0),
    ),
    "sll_jagged_jagged_bmm_jagged_out": Case(
        (PACKED, PACKED),
        lambda f, b, x, y: f.sll_jagged_jagged_bmm_jagged_out(x, y, *_xyz(b), b.size, True),
        loops.outer,
        oracle="short",
    ),
    "sll_array_jagged_bmm_jagged_out": Case(
        (("P",), PACKED),
        lambda f, b, p, y: f.sll_array_jagged_bmm_jagged_out(p, y, *_zyy(b), b.size, True),
        loops.times_array,
        oracle="short",
    ),
    "sll_jagged_flash_attention_basic": Case(
        (PACKED, PACKED, ("T", E)),
        lambda f, b, q, k, v: f.sll_jagged_flash_attention_basic(q, k, v, b.offsets, b.size),
        loops.basic,
        oracle="short",
        positive=True,
    ),
    "sll_jagged_flash_attention_basic, mask": Case(
        (PACKED, PACKED, ("T", E)),
        lambda f, b, q, k, v: f.sll_jagged_flash_attention_basic(q, k, v, b.offsets, b.size, True),
        lambda b, q, k, v: loops.basic(b, q, k, v, True),
        oracle="only short",
        positive=True,
    ),
    "sll_jagged_dense_flash_attention": Case(
        (PACKED, ("S", D, M), ("T", E), _dense(M)),
        lambda f, b, q, k, v, y: f.sll_jagged_dense_flash_attention(q, k, v, y, b.offsets, b.size),
        loops.target,
    ),
    "sll_jagged_dense_flash_attention, short bias": Case(
        (PACKED, ("S", D, M), ("T", E), ("S", 2, M)),
        lambda f, b, q, k, v, y: f.sll_jagged_dense_flash_attention(q, k, v, y, b.offsets, b.size),
        loops.target,
    ),
    "sll_multi_head_jagged_flash_attention": Case(
        ((H, "T", D),) * 3,
        lambda f, b, q, k, v: f.sll_multi_head_jagged_flash_attention(q, k, v, b.offsets, b.size),
        loops.multi_head,
        oracle="none",
        positive=True,
    ),
}


def outcome(
    call: Callable[..., Any], operands: Sequence[Tensor], *, gradient: bool = True, ones: bool = False
) -> list[Tensor]:
    """The results of a call, and its gradients along fixed directions in [-1, 1], or those of the results' sum."""
    found = call(*operands)
    results = [found] if isinstance(found, Tensor) else list(found)
    if not gradient:
        return [x.detach() for x in results]
    generator = torch.Generator().manual_seed(3)
    random = [torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) * 2 - 1 for x in results]
    directions = [torch.ones_like(x) for x in results] if ones else random
    # FBGEMM does not connect an operand without rows to its result; its gradient is as empty as ours.
    grads = torch.autograd.grad(results, operands, directions, allow_unused=True, materialize_grads=True)
    return [*(x.detach() for x in results), *grads]


def looped(name: str, b: Batch, operands: Sequence[Tensor], *, ones: bool = False) -> list[Tensor]:
    """The same by the loop. A loop over no segments does not see its operands: it is told of them."""
    leaves = [t.detach().requires_grad_() for t in operands]

    def call(*x: Tensor) -> list[Tensor]:
        found = CASES[name].loop(b, *x)
        return [y + 0 * sum(t.sum() for t in x) for y in ([found] if isinstance(found, Tensor) else found)]

    return outcome(call, leaves, ones=ones)


def close(got: Sequence[Tensor], wanted: Sequence[Tensor], b: Batch) -> None:
    """Equal up to the rounding of sums.

    Operands and directions are in [-1, 1], so what is added up are at most T + D terms no larger than `largest`, each
    rounded a few times: twice in a product, twice in a softmax whose arguments are sums of D products of their own.
    """
    assert len(got) == len(wanted)
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == y.dtype
        largest = max([1.0, *(float(t.abs().max()) for t in wanted if t.numel())])
        bound = (4 + 2 * D) * (sum(b.lengths) + D) * torch.finfo(x.dtype).eps * largest
        torch.testing.assert_close(x, y, rtol=0, atol=bound)
