"""Jagged from what users start with: position ids, padding masks, NestedTensors, NumPy's integers and arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import EDGE_LENGTHS, jagged
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import flexjag as fj
from flexjag import Jagged, ops
from flexjag.errors import LayoutError, MaskError, ShapeError
from flexjag.variants.hstu.bias import HSTUBias
from flexjag.variants.hstu.layer import HSTULayer
from flexjag.variants.hstu.mask import hstu_mask

LENGTHS = pytest.mark.parametrize("lengths", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS.keys())
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@LENGTHS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_position_ids(lengths: list[int], dtype: torch.dtype) -> None:
    want = jagged([n for n in lengths if n], 3)  # segments without tokens leave no trace
    for values, ids in ((want.values, want.positions), (want.values[None], want.positions[None])):
        found = Jagged.from_position_ids(values, ids.to(dtype))
        assert torch.equal(found.offsets, want.offsets)
        assert torch.equal(found.values, want.values)


def test_rows_of_packed_segments() -> None:
    ids = torch.tensor([[0, 1, 2, 0], [0, 0, 1, 2], [0, 1, 2, 3]])
    for values in (torch.arange(12).view(3, 4), torch.arange(12)):
        found = Jagged.from_position_ids(values, ids)
        assert found.lengths.tolist() == [3, 1, 1, 3, 4]
        assert found.values.tolist() == list(range(12))


V = torch.zeros(5, 2)
DENSE = torch.arange(12).view(3, 4)
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "positions that never restart": (
        lambda: Jagged.from_position_ids(DENSE, torch.arange(12).view(3, 4)),
        LayoutError,
        r"position_ids: must begin with 0; got position_ids\[4\]=4",
    ),
    "positions that begin later": (
        lambda: Jagged.from_position_ids(V, torch.arange(3, 8)),
        LayoutError,
        r"position_ids: must begin with 0; got position_ids\[0\]=3; Jagged\.from_lengths takes",
    ),
    "positions that go back": (
        lambda: Jagged.from_position_ids(V, torch.tensor([0, 1, 2, 1, 2])),
        LayoutError,
        r"must count on by 1 or restart at 0; got position_ids\[2\]=2, position_ids\[3\]=1",
    ),
    "positions that skip": (
        lambda: Jagged.from_position_ids(V, torch.tensor([0, 1, 3, 4, 0])),
        LayoutError,
        r"got position_ids\[1\]=1, position_ids\[2\]=3",
    ),
    "floating positions": (
        lambda: Jagged.from_position_ids(V, torch.zeros(5)),
        LayoutError,
        r"position_ids: must be integers \[T\] or \[B, N\]; got shape=\(5,\), dtype=torch.float32",
    ),
    "too few positions": (
        lambda: Jagged.from_position_ids(V, torch.arange(4)),
        LayoutError,
        "position_ids: must have one entry per token",
    ),
    "positions in a list": (
        lambda: Jagged.from_position_ids(V, [0, 1]),  # type: ignore[arg-type]
        LayoutError,
        "position_ids: must be a tensor",
    ),
    "a hole": (
        lambda: Jagged.from_padding_mask(DENSE, torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 1]])),
        LayoutError,
        "mask: must have the tokens of a row together; compact=True.*; got row=1, hole_before=3, rows_with_holes=2",
    ),
    "segment ids for a mask": (
        lambda: Jagged.from_padding_mask(DENSE, torch.tensor([[1, 1, 2, 0]] * 3)),
        LayoutError,
        r"mask: must be bool, or hold 0 for padding and 1 for tokens; got mask\[0, 2\]=2",
    ),
    "an additive mask": (
        lambda: Jagged.from_padding_mask(DENSE, torch.full((3, 4), -torch.inf)),
        LayoutError,
        r"mask: must be bool, or hold 0 .*got mask\[0, 0\]=-inf",
    ),
    "a mask of another shape": (
        lambda: Jagged.from_padding_mask(DENSE, torch.ones(3, 5)),
        LayoutError,
        r"mask: must be \[S, N\], as dense \[S, N, \.\.\.\] begins; got mask=\(3, 5\), dense=\(3, 4\)",
    ),
    "no NestedTensor": (lambda: Jagged.from_nested(V), ShapeError, "nested: must be a NestedTensor; got type='Tensor'"),
    "another ragged dimension": (
        lambda: Jagged.from_nested(nested([2, 3], 4).transpose(1, 2)),
        ShapeError,
        r"nested: must be ragged in dimension 1.*ragged_dimension=2",
    ),
    "nested holes": (
        lambda: Jagged.from_nested(narrowed([1, 0], [2, 3])),
        LayoutError,
        "nested: must have no rows between or behind its segments; compact=True.*; got rows=8, tokens=5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(name: str) -> None:
    make, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        make()


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """Padding on either side, and sometimes holes."""
    rows, width = draw(st.integers(0, 5)), draw(st.integers(0, 7))
    out = np.zeros((rows, width), bool)
    for row in out:
        low = draw(st.integers(0, width))
        row[low : draw(st.integers(low, width))] = True
        if width and draw(st.booleans()):
            row[draw(st.integers(0, width - 1))] = False
    return out


def has_holes(mask: np.ndarray) -> bool:
    return any("10" in "".join(map(str, row.astype(int))).strip("0") for row in mask)


@given(masks(), st.sampled_from([torch.bool, torch.int64, torch.int32, torch.float32]))
def test_padding_masks(mask: np.ndarray, dtype: torch.dtype) -> None:
    dense, given_mask = torch.randn(*mask.shape, 2, dtype=torch.float64), torch.from_numpy(mask).to(dtype)
    if has_holes(mask):
        with pytest.raises(LayoutError, match="must have the tokens of a row together"):
            Jagged.from_padding_mask(dense, given_mask)
    found = Jagged.from_padding_mask(dense, given_mask, compact=has_holes(mask))
    assert found.validate().num_segments == mask.shape[0]
    for s, row in enumerate(mask):
        assert torch.equal(found[s], dense[s][torch.from_numpy(row)])


def test_gradients_of_what_padding_masks_keep() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]])
    dense = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Jagged.from_padding_mask(x, mask, compact=True).values * 2, (dense,))


def nested(lengths: list[int], width: int, **options: Any) -> Tensor:
    parts = [torch.randn(n, width, dtype=torch.float64) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, **options)


def narrowed(starts: list[int], lengths: list[int]) -> Tensor:
    dense = torch.arange(24, dtype=torch.float64).view(2, 4, 3)
    return torch.nested.narrow(dense, 1, torch.tensor(starts), torch.tensor(lengths), layout=torch.jagged)


@pytest.mark.parametrize("lengths", [[2, 3], [1], [4, 0, 1], [0]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_nested_tensors_and_back(lengths: list[int], dtype: torch.dtype) -> None:
    x = jagged(lengths, 3)
    x = Jagged(x.values, x.offsets.to(dtype))
    found = x.to_nested()
    assert found.layout == torch.jagged
    assert [torch.equal(a, b) for a, b in zip(found.unbind(), x, strict=True)] == [True] * len(lengths)
    back = Jagged.from_nested(found)
    assert back.values.data_ptr() == x.values.data_ptr()
    assert torch.equal(back.offsets.long(), x.offsets.long())
    spare = Jagged(torch.cat([x.values, x.values[:1]]), x.offsets).to_nested()
    assert [n.shape[0] for n in spare.unbind()] == lengths


def test_gradients_through_nested_tensors() -> None:
    values = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    x = Jagged.from_lengths(values, [2, 3])
    Jagged.from_nested(x.to_nested() * 3.0).values.sum().backward()
    assert values.grad is not None
    assert (values.grad == 3).all()


def test_nested_holes_are_closed_by_choice() -> None:
    for starts, lengths in (([1, 0], [2, 3]), ([0, 2], [4, 2]), ([3, 3], [1, 0])):
        part = narrowed(starts, lengths)
        found = Jagged.from_nested(part, compact=True).validate()
        assert [x.tolist() for x in found] == [x.tolist() for x in part.unbind()]


def test_strided_nested_tensors() -> None:
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    found = Jagged.from_nested(torch.nested.nested_tensor(parts))
    assert all(torch.equal(a, b) for a, b in zip(found, parts, strict=True))


OFFSETS = np.array([0, 2, 2, 5])
X = jagged([2, 0, 3], 2, 16)
TABLE = torch.arange(6.0).view(2, 3)
SAME: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "offsets": (lambda: Jagged(X.values, OFFSETS).offsets, lambda: X.offsets),
    "cu_seqlens": (lambda: Jagged(X.values, OFFSETS.astype(np.int32)).offsets, lambda: X.offsets.int()),
    "narrow offsets": (lambda: Jagged(X.values, OFFSETS.astype(np.uint8)).offsets, lambda: X.offsets),
    "lengths": (lambda: Jagged.from_lengths(X.values, np.array([2, 0, 3], np.int16)).offsets, lambda: X.offsets),
    "to_padded": (lambda: X.to_padded(max_length=np.int64(4)), lambda: X.to_padded(max_length=4)),  # type: ignore[arg-type]
    "from_padded": (
        lambda: Jagged.from_padded(X.to_padded(), np.array([2, 0, 3]), total=np.int64(5)).values,  # type: ignore[arg-type]
        lambda: X.values,
    ),
    "index": (lambda: X[np.int64(2)], lambda: X[2]),  # type: ignore[index]
    "indices": (
        lambda: ops.jagged_index_select(X, np.array([2, 0])).values,  # type: ignore[arg-type]
        lambda: ops.jagged_index_select(X, torch.tensor([2, 0])).values,
    ),
    "split": (
        lambda: ops.jagged_split(X, [np.int64(1)])[0].values,  # type: ignore[list-item]
        lambda: ops.jagged_split(X, [1])[0].values,
    ),
    "split by segment": (
        lambda: ops.jagged_split(X, [np.array([1, 0, 2])])[0].values,  # type: ignore[list-item]
        lambda: ops.jagged_split(X, [torch.tensor([1, 0, 2])])[0].values,
    ),
    "padding mask": (
        lambda: Jagged.from_padding_mask(torch.arange(6).view(2, 3), np.array([[1, 1, 0], [0, 1, 1]])).values,  # type: ignore[arg-type]
        lambda: torch.tensor([0, 1, 4, 5]),
    ),
    "bool padding mask": (
        lambda: Jagged.from_padding_mask(torch.arange(4).view(2, 2), np.array([[True, False], [True, True]])).values,  # type: ignore[arg-type]
        lambda: torch.tensor([0, 2, 3]),
    ),
    "position ids": (
        lambda: Jagged.from_position_ids(X.values, np.array([0, 1, 0, 1, 2], np.int16)).offsets,  # type: ignore[arg-type]
        lambda: torch.tensor([0, 2, 5]),
    ),
    "table": (lambda: fj.RelativeBias(TABLE.numpy()).table, lambda: TABLE),  # type: ignore[arg-type]
    "T5's table": (lambda: fj.T5Bias(np.zeros((2, 8)), max_distance=9).table, lambda: torch.zeros(2, 8).double()),  # type: ignore[arg-type]
    "boundaries": (
        lambda: fj.BucketedBias(TABLE.numpy(), np.array([-1, 4])).boundaries,  # type: ignore[arg-type]
        lambda: torch.tensor([-1, 4]),
    ),
    "given slopes": (lambda: fj.Alibi(np.array([0.5, 0.25])).slopes, lambda: torch.tensor([0.5, 0.25]).double()),  # type: ignore[arg-type]
    "slopes": (lambda: fj.Alibi.from_heads(np.int64(4)).slopes, lambda: fj.Alibi.from_heads(4).slopes),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", SAME)
def test_numpys_integers_are_taken_for_integers(name: str) -> None:
    found, wanted = (make() for make in SAME[name])
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


def hstu(number: Callable[[int], Any], counts: Callable[[list[int]], Any]) -> fj.Mask:
    options = {"target_group_size": number(2), "max_attn_len": number(2), "min_full": number(1)}
    return hstu_mask(X, contextual=number(1), targets=counts([1, 0, 1]), **options)


NODES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "window": (lambda: fj.Window(np.int64(1), np.int32(1)), lambda: fj.Window(1, 1)),  # type: ignore[arg-type]
    "prefix": (lambda: fj.Prefix(np.array([1, 0, 2])), lambda: fj.Prefix(torch.tensor([1, 0, 2]))),  # type: ignore[arg-type]
    "chunked": (lambda: fj.Chunked(np.uint8(2)), lambda: fj.Chunked(2)),  # type: ignore[arg-type]
    "global": (lambda: fj.GlobalTokens(np.int64(1)), lambda: fj.GlobalTokens(1)),  # type: ignore[arg-type]
    "hstu": (lambda: hstu(np.int64, np.array), lambda: hstu(int, torch.tensor)),
    "group": (lambda: fj.SameGroup(np.array([1, 2, 2, 1, 2])), lambda: fj.SameGroup(torch.tensor([1, 2, 2, 1, 2]))),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", NODES)
def test_masks_take_numpys_integers(name: str) -> None:
    found, wanted = (make() for make in NODES[name])
    options = {"block_size": np.int64(16), "max_length": np.int64(4), "max_tokens": np.int64(5)}
    assert torch.equal(fj.plan(X, mask=found, **options).to_dense(), fj.plan(X, mask=wanted).to_dense())  # type: ignore[arg-type]


def test_numpys_arrays_are_copied_and_checked() -> None:
    bounds = np.array([1, 0, 2])
    mask = fj.Prefix(bounds)  # type: ignore[arg-type]
    bounds[:] = 5
    assert mask.n.tolist() == [1, 0, 2]  # type: ignore[union-attr]
    with pytest.raises(MaskError, match="n: a per-segment bound must be a 1-D integer tensor"):
        fj.Prefix(np.array([0.5]))  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match=r"offsets: must be int32 or int64; got dtype=torch\.uint64"):
        Jagged(X.values, OFFSETS.astype(np.uint64))  # type: ignore[arg-type]


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_graphs_convert_where_sizes_may_depend_on_data() -> None:
    graphs = CompileCounter()
    by_positions = torch.compile(Jagged.from_position_ids, fullgraph=True, backend=graphs, dynamic=True)
    for lengths in ([2, 3], [4, 1, 1], [7, 2]):
        want = jagged(lengths, 3)
        found = by_positions(want.values, want.positions)
        assert torch.equal(found.values, want.values)
        assert torch.equal(found.offsets, want.offsets)
    with pytest.raises(RuntimeError, match="position_ids: must begin with 0, and count on by 1"):
        by_positions(jagged([5], 3).values, torch.tensor([0, 1, 2, 1, 2]))
    assert graphs.frame_count == 1
    by_mask = torch.compile(Jagged.from_padding_mask, fullgraph=True, backend=graphs, dynamic=True)
    for mask in ([[1, 1, 0], [0, 1, 0]], [[0, 1, 1], [1, 1, 1], [0, 1, 0]]):
        given_mask = torch.tensor(mask)
        dense = torch.randn(*given_mask.shape, 5)
        assert torch.equal(by_mask(dense, given_mask).values, Jagged.from_padding_mask(dense, given_mask).values)
    with pytest.raises(RuntimeError, match="mask: must have the tokens of a row together"):
        by_mask(torch.randn(2, 3, 5), torch.tensor([[1, 0, 1], [1, 1, 1]]))
    assert graphs.frame_count == 2


def test_layers_take_numpys_integers() -> None:
    layer = HSTULayer(np.int64(8), np.int64(2), np.int64(4), bias=HSTUBias(np.int64(2), max_distance=np.int64(3)))  # type: ignore[arg-type]
    assert repr(layer) == repr(HSTULayer(8, 2, 4, bias=HSTUBias(2, max_distance=3)))


@pytest.mark.parametrize("compiled", [False, True])
def test_scale_of_numpy(compiled: bool) -> None:
    def call(x: Jagged) -> Tensor:
        return fj.attention(x, x, x, scale=np.float64(0.25)).values  # type: ignore[arg-type]

    run = torch.compile(call, fullgraph=True, backend="eager") if compiled else call
    torch.testing.assert_close(run(X), fj.attention(X, X, X, scale=0.25).values)
