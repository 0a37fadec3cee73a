"""Offsets: what they must be wherever they are taken, in eager mode and in graphs; and what is no offset at all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import jagged
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter

import flexjag as fj
from flexjag import Jagged, ops
from flexjag.errors import LayoutError, SegmentError, ShapeError
from flexjag.offsets import check_ends, mark_varying

WHOLE = jagged([3, 1, 2, 4], 2, 16, dtype=torch.float32)
LATE = Jagged(WHOLE.values, WHOLE.offsets[1:])
"""All but the first segment of a batch, as they come from a KeyedJaggedTensor's offsets."""
EARLY = Jagged(WHOLE.values, WHOLE.offsets[:-1])
BEYOND = Jagged(WHOLE.values, torch.tensor([0, 3, 11]))

READERS: dict[str, Callable[[Jagged], object]] = {
    "attention": lambda x: fj.attention(x, x, x, backend="tiled").values,
    "plan": lambda x: fj.attention(x, x, x, plan=fj.plan(x, mask=fj.Causal()), backend="tiled").values,
    "keys": lambda x: fj.attention(jagged([1] * x.num_segments, 2, 16, dtype=torch.float32), x, x).values,
    "positions": lambda x: x.positions,
    "segment_ids": lambda x: x.segment_ids,
    "to_padded": lambda x: x.to_padded(max_length=4),
    "concat": lambda x: Jagged.concat([x, x]).values,
    "index_select": lambda x: ops.jagged_index_select(x, torch.tensor([0])).values,
    "split": lambda x: ops.jagged_split(x, [1])[0].values,
    "jagged_concat": lambda x: ops.jagged_concat([x, x]).values,
    "padded_dense": lambda x: ops.jagged_to_padded_dense(x, 4),
    "segment_sum": ops.segment_sum,
}
ON_THE_HOST: dict[str, Callable[[Jagged], object]] = {
    "to_list": lambda x: x.to_list(),
    "unbind": lambda x: x.unbind(),
    "item": lambda x: x[0],
    "slice": lambda x: x[:1],
    "iteration": lambda x: list(x),
    "validate": lambda x: x.validate(),
}


@pytest.mark.parametrize("name", [*READERS, *ON_THE_HOST])
@pytest.mark.parametrize("batch", [LATE, BEYOND], ids=["late", "beyond"])
def test_offsets_of_something_else_are_refused(name: str, batch: Jagged) -> None:
    with pytest.raises(LayoutError, match=r"offsets: must .*take segments a to b of a batch by Jagged"):
        (READERS | ON_THE_HOST)[name](batch)


@pytest.mark.parametrize("name", [n for n in READERS if n not in ("keys", "plan")])
def test_graphs_refuse_them_too_and_are_no_more(name: str) -> None:
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(READERS[name], fullgraph=True, backend=graphs)
    for lengths in ([3, 1, 2, 4], [5, 0], [2, 2, 3]):
        compiled(jagged(lengths, 2, 16, dtype=torch.float32))
    for batch in (LATE, BEYOND):
        with pytest.raises((RuntimeError, LayoutError), match=r"offsets: must .*take segments a to b of a batch"):
            compiled(batch)
    assert graphs.frame_count == 1


def test_inductor_keeps_the_assertion() -> None:
    compiled = torch.compile(lambda x: x.positions, fullgraph=True)
    assert torch.equal(compiled(WHOLE), WHOLE.positions)
    for batch in (LATE, BEYOND):
        with pytest.raises(RuntimeError, match=r"offsets: must start at 0 and end at the number of rows"):
            compiled(batch)


def test_plans_of_fixed_capacity_assert_without_looking() -> None:
    fj.plan(EARLY, max_tokens=10)
    for batch in (LATE, BEYOND):
        with pytest.raises(RuntimeError, match=r"q\.offsets: must start at 0"):
            fj.plan(batch, max_tokens=10)


def test_rows_behind_the_last_offset_are_spare() -> None:
    assert EARLY.positions.tolist() == [0, 1, 2, 0, 0, 1, 0, 1, 2, 3]
    assert [len(t) for t in EARLY.unbind()] == [3, 1, 2]
    assert torch.equal(EARLY[:].values, WHOLE.values[:6])
    with pytest.raises(LayoutError, match=r"batches\[0\]\.offsets: must start at 0 and end at the number of rows"):
        Jagged.concat([EARLY])


def test_what_the_error_proposes() -> None:
    """A key of a key-major batch."""
    part = WHOLE[1:3]
    assert part.lengths.tolist() == [1, 2]
    assert torch.equal(part.values, WHOLE.values[3:6])
    by_index = ops.jagged_index_select(WHOLE, torch.arange(1, 3))
    assert torch.equal(by_index.values, part.values)
    assert torch.equal(by_index.offsets, part.offsets)


def test_nothing_is_asserted_on_meta() -> None:
    check_ends(torch.empty(3, dtype=torch.int64, device="meta"), 5)


class Trace(nn.Module):
    def __init__(self, fn: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, given: Tensor) -> object:
        return self.fn(given)


V = torch.zeros(5, 2)
OFFSETS = torch.tensor([0, 5])
NESTED = [torch.zeros(2, 3), torch.zeros(3, 3)]
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "a number of lengths": (lambda: Jagged.from_lengths(V, 10), LayoutError, "lengths: must be a 1-D tensor or a seq"),  # type: ignore[arg-type]
    "truth values": (lambda: Jagged.from_lengths(V[:1], [True, False]), LayoutError, "lengths: must be integers"),
    "numpy's truth values": (
        lambda: Jagged.from_lengths(V[:1], np.array([True, False])),  # type: ignore[arg-type]
        LayoutError,
        "lengths: must be integers",
    ),
    "numpy's floats": (lambda: Jagged.from_lengths(V, np.ones(5)), LayoutError, "lengths: must be integers"),  # type: ignore[arg-type]
    "numpy values": (lambda: Jagged(V.numpy(), OFFSETS), LayoutError, "values: .*torch.from_numpy"),  # type: ignore[arg-type]
    "numpy's float offsets": (lambda: Jagged(V, np.array([0.0, 5.0])), LayoutError, "offsets: must be int32 or int64"),  # type: ignore[arg-type]
    "numpy and lengths": (lambda: Jagged.from_lengths(V.numpy(), [5]), ShapeError, "values: .*torch.from_numpy"),  # type: ignore[arg-type]
    "numpy in a list": (lambda: Jagged.from_list([V.numpy()]), ShapeError, r"tensors\[0\]: .*torch.from_numpy"),  # type: ignore[list-item]
    "numpy, padded": (lambda: Jagged.from_padded(V.numpy(), [1] * 5), ShapeError, "dense: .*torch.from_numpy"),  # type: ignore[arg-type]
    "no values": (lambda: Jagged(None, OFFSETS), LayoutError, "values: must be a tensor; got type='NoneType'"),  # type: ignore[arg-type]
    "a number of tensors": (lambda: Jagged.from_list(3), ShapeError, "tensors: must be a list; got type='int'"),  # type: ignore[arg-type]
    "an empty JaggedTensor": (
        lambda: Jagged(torch.zeros(0), torch.zeros(0, dtype=torch.int64)),
        LayoutError,
        r"offsets: must be 1-D with S\+1 entries; got shape=\(0,\); those of no segments are a single 0",
    ),
    "a NestedTensor": (
        lambda: Jagged(torch.nested.nested_tensor(NESTED, layout=torch.jagged), OFFSETS),
        ShapeError,
        r"values: must be packed; Jagged\.from_list\(nested\.unbind\(\)\)",
    ),
    "a sparse tensor": (lambda: Jagged(V.to_sparse(), OFFSETS), ShapeError, r"values: must be packed.*to_dense"),
    "a tracer's values": (lambda: fx.symbolic_trace(Trace(lambda v: Jagged(v, OFFSETS))), LayoutError, "torch.export"),
    "a tracer's lengths": (
        lambda: fx.symbolic_trace(Trace(lambda n: Jagged.from_lengths(V, n))),
        LayoutError,
        "lengths: must be a 1-D tensor",
    ),
    "a tracer's list": (lambda: fx.symbolic_trace(Trace(Jagged.from_list)), ShapeError, "tensors: must be a list"),  # type: ignore[arg-type]
    "no batches": (lambda: Jagged.concat([]), LayoutError, "batches: must hold at least one"),
    "another feature shape": (
        lambda: Jagged.concat([jagged([1], 2), jagged([1], 3)]),
        ShapeError,
        r"batches\[1\]: must agree with batches\[0\]",
    ),
    "a tensor among batches": (lambda: Jagged.concat([V]), ShapeError, r"batches\[0\]: must be a Jagged"),  # type: ignore[list-item]
    "a segment too many": (lambda: WHOLE[4], SegmentError, "index: must be that of a segment; got index=4, segments=4"),
    "a segment before": (lambda: WHOLE[-5], SegmentError, "index: must be that of a segment; got index=-5"),
    "an index that is none": (lambda: WHOLE["a"], SegmentError, "index: must be an integer or a slice"),  # type: ignore[index]
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_none_is_refused_in_one_line(name: str) -> None:
    make, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        make()


def test_numpys_integers_are_lengths() -> None:
    for lengths in (np.array([2, 3]), [np.int64(2), np.int32(3)], [torch.tensor(2), torch.tensor(3)]):
        assert Jagged.from_lengths(V, lengths).offsets.tolist() == [0, 2, 5]  # type: ignore[arg-type]


FLOAT8 = jagged([2, 3], 1, 16).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("backend", ["auto", "tiled", "segments", "reference"])
def test_float8_is_not_attended(backend: str) -> None:
    with pytest.raises(ShapeError, match="q: float8 values are stored and moved, not computed with; convert them"):
        fj.attention(FLOAT8, FLOAT8, FLOAT8, backend=backend)


@pytest.mark.parametrize(
    "op", [ops.jagged_softmax, ops.segment_sum, ops.segment_mean, ops.segment_max, ops.segment_min]
)
def test_float8_is_not_computed_with(op: Callable[[Jagged], object]) -> None:
    with pytest.raises(ShapeError, match="x: float8 values are stored and moved"):
        op(FLOAT8)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64])
def test_types_without_kernels_are_moved(dtype: torch.dtype) -> None:
    wide = jagged([2, 0, 3], 4).map(lambda v: (v.abs() * 4).round().clamp(max=7))  # exact in three bits
    x = wide.to(dtype)
    back = Jagged.from_padded(x.to_padded(), x.lengths)
    assert back.dtype == dtype
    assert torch.equal(back.values.double(), x.values.double())
    assert torch.equal(x.to_padded(max_length=2).double(), wide.to_padded(max_length=2))
    assert torch.equal(ops.jagged_concat([x, x]).values.double(), ops.jagged_concat([wide, wide]).values)


def test_per_segment_bounds_are_marked_as_varying() -> None:
    """Else the second number of segments compiles a graph of its own. (A single segment always does.)"""
    torch._dynamo.reset()
    graphs = CompileCounter()

    @torch.compile(fullgraph=True, backend=graphs)
    def attend(x: Jagged, mask: fj.Mask) -> Tensor:
        return fj.attention(x, x, x, mask=mask, backend="tiled").values

    for lengths in ([3, 5], [4, 4, 2], [1, 2, 3, 4]):
        x = jagged(lengths, 1, 16, dtype=torch.float32)
        attend(x, fj.Prefix(x.lengths // 2))
    assert graphs.frame_count == 1


def test_a_tensor_is_marked_once() -> None:
    import torch._dynamo

    x = torch.zeros(3)
    mark_varying(x, 0)
    mark_varying(x, 0)
    assert x._dynamo_weak_dynamic_indices == {0}  # type: ignore[attr-defined]
