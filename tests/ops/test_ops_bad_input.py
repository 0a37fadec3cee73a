"""Mistakes in the arguments of ragged ops: a flexjag error that names the argument."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from cases import jagged

from flexjag import Jagged, ops
from flexjag.errors import LayoutError, ShapeError

X, Y = jagged([2, 0, 3], 4), jagged([1, 1, 2], 4)
DECREASING = Jagged(X.values, torch.tensor([0, 4, 3, 5]))
LATE = Jagged(X.values, torch.tensor([1, 2, 3, 5]))
SHORT = Jagged(X.values, torch.tensor([0, 2, 3, 4]))
INTEGERS = Jagged(X.values.long(), X.offsets)
FLOAT32 = X.to(torch.float32)
FEWER = jagged([2, 3], 4)
PADDED = torch.zeros(3, 3, 4, dtype=torch.float64)
WEIGHT = torch.zeros(3, 4, 2, dtype=torch.float64)
P = ops.jagged_jagged_bmm_jagged_out(X, Y)
I64 = torch.tensor([0, 1])

UNARY: dict[str, Callable[[Jagged], object]] = {
    "jagged_softmax": ops.jagged_softmax,
    "jagged_dense_bmm": lambda x: ops.jagged_dense_bmm(x, WEIGHT),
    "jagged_jagged_bmm": lambda x: ops.jagged_jagged_bmm(x, x),
    "jagged_jagged_bmm_jagged_out": lambda x: ops.jagged_jagged_bmm_jagged_out(x, Y),
    "jagged_dense_elementwise_add": lambda x: ops.jagged_dense_elementwise_add(x, PADDED),
    "jagged_dense_elementwise_mul": lambda x: ops.jagged_dense_elementwise_mul(x, PADDED),
    "jagged_to_padded_dense": ops.jagged_to_padded_dense,
    "dense_to_jagged": lambda x: ops.dense_to_jagged(PADDED, x.offsets, total=5),
    "jagged_concat": lambda x: ops.jagged_concat([x, Y]),
    "segment_broadcast": lambda x: ops.segment_broadcast(X.values[:3], x),
    "segment_sum": ops.segment_sum,
    "segment_mean": ops.segment_mean,
    "segment_max": ops.segment_max,
    "segment_min": ops.segment_min,
    "jagged_layer_norm": lambda x: ops.jagged_layer_norm(x, per="segment"),
    "jagged_rms_norm": lambda x: ops.jagged_rms_norm(x, per="segment"),
    "jagged_dense_attention": lambda x: ops.jagged_dense_attention(PADDED, x, x),
}


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize(
    ("batch", "rule"),
    [(DECREASING, "must not decrease"), (LATE, "must start at 0"), (SHORT, "must end at")],
    ids=["decreasing", "late", "short"],
)
def test_offsets_that_are_none(name: str, batch: Jagged, rule: str) -> None:
    with pytest.raises(LayoutError, match=rf"offsets: {rule}"):
        UNARY[name](batch)


def test_bad_offsets_are_found_inside_a_graph() -> None:
    compiled = torch.compile(ops.jagged_softmax, fullgraph=True, backend="eager")
    with pytest.raises(LayoutError, match="must not decrease"):
        compiled(DECREASING)


@pytest.mark.parametrize("name", [name for name in UNARY if name != "dense_to_jagged"])
def test_tensors_instead_of_batches(name: str) -> None:
    with pytest.raises(LayoutError, match=r"must be a flexjag\.Jagged"):
        UNARY[name](X.values)  # pyright: ignore[reportArgumentType]


TAKE_INTEGERS = ["jagged_to_padded_dense", "dense_to_jagged", "jagged_concat", "segment_broadcast"]
TAKE_INTEGERS += ["segment_sum", "segment_max", "segment_min"]


@pytest.mark.parametrize("name", [name for name in UNARY if name not in TAKE_INTEGERS])
def test_integers_where_reals_are_needed(name: str) -> None:
    with pytest.raises(ShapeError, match="floating point"):
        UNARY[name](INTEGERS)


WRONG: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "float offsets": (LayoutError, "offsets: must be 1-D int32", lambda: ops.dense_to_jagged(PADDED, torch.zeros(4))),
    "2-D offsets": (LayoutError, "offsets: must be 1-D", lambda: ops.dense_to_jagged(PADDED, torch.zeros(2, 2).long())),
    "offsets list": (LayoutError, "offsets: must be a tensor", lambda: ops.dense_to_jagged(PADDED, [0, 1])),
    "rows and offsets": (ShapeError, "offsets: must have one more", lambda: ops.dense_to_jagged(PADDED, I64)),
    "1-D dense": (ShapeError, "dense: must be", lambda: ops.dense_to_jagged(PADDED[:, 0, 0], X.offsets)),
    "negative total": (LayoutError, "total: must not", lambda: ops.dense_to_jagged(PADDED, X.offsets, total=-1)),
    "wrong total": (LayoutError, "offsets: must end", lambda: ops.dense_to_jagged(PADDED, X.offsets, total=4)),
    "longer than dense": (LayoutError, "offsets: no segment", lambda: ops.dense_to_jagged(PADDED[:, :2], X.offsets)),
    "negative length": (ShapeError, "max_length: must not", lambda: ops.jagged_to_padded_dense(X, -1)),
    "add, longer": (LayoutError, "no segment", lambda: ops.jagged_dense_elementwise_add(X, PADDED[:, :2])),
    "mul, longer": (LayoutError, "no segment", lambda: ops.jagged_dense_elementwise_mul(X, PADDED[:, :2])),
    "mul, dtype": (ShapeError, "dense: must have the dtype", lambda: ops.jagged_dense_elementwise_mul(FLOAT32, PADDED)),
    "mul, features": (
        ShapeError,
        "dense: must be",
        lambda: ops.jagged_dense_elementwise_mul(X, PADDED[..., :1]),
    ),
    "mul, segments": (ShapeError, "dense: must have", lambda: ops.jagged_dense_elementwise_mul(X, PADDED[:2])),
    "bmm, list": (ShapeError, "y: must be a tensor", lambda: ops.jagged_dense_bmm(X, [1.0])),
    "bmm, dtype": (ShapeError, "y: must have the dtype", lambda: ops.jagged_dense_bmm(X, WEIGHT.float())),
    "bmm, device": (ShapeError, "y: must be on the device", lambda: ops.jagged_dense_bmm(X, WEIGHT.to("meta"))),
    "bmm, dims": (ShapeError, "y: must have 3 dimensions", lambda: ops.jagged_dense_bmm(X, WEIGHT[0])),
    "bmm, segments": (ShapeError, "y: must have 3 dimensions", lambda: ops.jagged_dense_bmm(X, WEIGHT[:2])),
    "bmm, features": (ShapeError, "y: must be .S, D, E.", lambda: ops.jagged_dense_bmm(X, WEIGHT[:, :3])),
    "bmm, 3-D": (ShapeError, "x: its values must have 2", lambda: ops.jagged_dense_bmm(jagged([1], 2, 2), WEIGHT)),
    "bmm, two layouts": (LayoutError, "y: must have the offsets", lambda: ops.jagged_jagged_bmm(X, Y)),
    "bmm, two dtypes": (ShapeError, "y: must have the dtype", lambda: ops.jagged_jagged_bmm(X, FLOAT32)),
    "jagged out, segments": (LayoutError, "y: must have as many", lambda: ops.jagged_jagged_bmm_jagged_out(X, FEWER)),
    "jagged out, features": (
        ShapeError,
        "y: must have the features",
        lambda: ops.jagged_jagged_bmm_jagged_out(X, jagged([1, 1, 2], 3)),
    ),
    "jagged out, total": (LayoutError, "total: must be", lambda: ops.jagged_jagged_bmm_jagged_out(X, Y, total=3)),
    "array, no rows": (LayoutError, "matrices: must have as many entries", lambda: ops.array_jagged_bmm(P, Y)),
    "array, rows": (LayoutError, "rows: must have as many segments", lambda: ops.array_jagged_bmm(P, Y, I64)),
    "array, float rows": (
        LayoutError,
        "rows: must be 1-D int32",
        lambda: ops.array_jagged_bmm(P, Y, torch.zeros(4)),
    ),
    "softmax, sizes": (LayoutError, "matrices: must have", lambda: ops.jagged2_softmax(P, X.offsets)),
    "softmax, dim": (ShapeError, "dim: must be 0 or 1", lambda: ops.jagged2_softmax(P, X.offsets, Y.offsets, dim=2)),
    "indices, high": (LayoutError, "indices: must be from", lambda: ops.jagged_index_select(X, torch.tensor([3]))),
    "indices, low": (LayoutError, "indices: must be from", lambda: ops.jagged_index_select(X, torch.tensor([-1]))),
    "indices, float": (LayoutError, "indices: must be 1-D", lambda: ops.jagged_index_select(X, torch.zeros(1))),
    "indices, total": (LayoutError, "total: must be", lambda: ops.jagged_index_select(X, I64, total=9)),
    "concat, none": (LayoutError, "batches: must hold", lambda: ops.jagged_concat([])),
    "concat, segments": (LayoutError, "batches.1.: must have as many", lambda: ops.jagged_concat([X, FEWER])),
    "concat, dtype": (ShapeError, "batches.1.: must have the dtype", lambda: ops.jagged_concat([X, FLOAT32])),
    "concat, features": (
        ShapeError,
        "batches.1.: must have the feature shape",
        lambda: ops.jagged_concat([X, jagged([1, 1, 1], 2)]),
    ),
    "split, negative": (LayoutError, "lengths.0.: must not", lambda: ops.jagged_split(X, [-1])),
    "split, too long": (LayoutError, "lengths.1.: must be from 0", lambda: ops.jagged_split(X, [1, X.lengths])),
    "split, shape": (LayoutError, "lengths.0.: must have one entry", lambda: ops.jagged_split(X, [I64])),
    "split, totals": (LayoutError, "totals: must have one", lambda: ops.jagged_split(X, [1], totals=[])),
    "split, total": (LayoutError, "total: must be", lambda: ops.jagged_split(X, [1], totals=[1])),
    "norm, no features": (ShapeError, "x: its values must have a feature", lambda: ops.jagged_layer_norm(jagged([2]))),
    "norm, weight": (ShapeError, "weight: must have the feature", lambda: ops.jagged_rms_norm(X, X.values[0, :2])),
    "norm, bias": (ShapeError, "bias: must have the dtype", lambda: ops.jagged_layer_norm(X, bias=torch.zeros(4))),
    "norm, other half": (
        ShapeError,
        "weight: must have the dtype of x, or be float32 beside half precision",
        lambda: ops.jagged_rms_norm(X.to(torch.bfloat16), torch.zeros(4, dtype=torch.float16)),
    ),
    "norm, half beside float32": (
        ShapeError,
        "weight: must have the dtype of x",
        lambda: ops.jagged_rms_norm(FLOAT32, torch.zeros(4, dtype=torch.bfloat16), per="segment"),
    ),
    "broadcast, list": (ShapeError, "rows: must be a tensor", lambda: ops.segment_broadcast([1.0], X)),
    "broadcast, segments": (ShapeError, "rows: must have one row", lambda: ops.segment_broadcast(X.values, X)),
    "broadcast, device": (
        ShapeError,
        "rows: must be on the device",
        lambda: ops.segment_broadcast(X.values[:3].to("meta"), X),
    ),
    "norm, per": (ShapeError, "per: must be", lambda: ops.jagged_layer_norm(X, per="batch")),
    "attention, layouts": (LayoutError, "value: must have", lambda: ops.jagged_dense_attention(PADDED, X, Y)),
    "attention, query": (
        ShapeError,
        "query: must be",
        lambda: ops.jagged_dense_attention(PADDED[..., :2], X, X),
    ),
    "attention, bias queries": (
        ShapeError,
        "bias: must be .S, N, M.",
        lambda: ops.jagged_dense_attention(PADDED, X, X, PADDED),
    ),
    "attention, short bias": (
        LayoutError,
        "bias: must have a row for every position",
        lambda: ops.jagged_dense_attention(PADDED, X, X, PADDED[:, :2, :3]),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name: str) -> None:
    error, text, call = WRONG[name]
    with pytest.raises(error) as caught:
        call()
    assert re.search(text, str(caught.value)), str(caught.value)
