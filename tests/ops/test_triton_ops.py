"""The Triton kernels in Triton's interpreter, against loops over segments and against the plain kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import EDGE_LENGTHS, check_error
from ops_table import OPS, both, offsets_of, others, product
from test_ops import with_gradients
from torch import Tensor

from flexjag.codegen.worker import Worker
from flexjag.errors import CodegenError
from flexjag.ops.register import OPERATORS

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(interpret=True) as running:
        yield running


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_equals_a_loop_at_the_edges(name: str, dtype: torch.dtype, worker: Worker) -> None:
    op, batches = OPS[name], list(EDGE_LENGTHS.values())
    for lengths, got in zip(
        batches, worker.call("call_function", "interpreted", "run_batches", name, batches, dtype), strict=True
    ):
        operands = op.operands(lengths, dtype)
        exact = [t.double() for t in operands]
        same, true = (
            with_gradients(lambda *t, n=lengths: op.loop(n, others(n), *t), leaves) for leaves in (operands, exact)
        )
        for kind, found, own, wanted in zip(("result", "gradient"), got, same, true, strict=True):
            for i, (x, y, z) in enumerate(zip(found, own, wanted, strict=True)):
                assert x.shape == z.shape
                check_error(x, y, z, f"{lengths}: {kind} {i}", products=sum(lengths))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["jagged_layer_norm, segment", "jagged_rms_norm, segment"])
def test_norms_take_float32_parameters_beside_half_precision(name: str, dtype: torch.dtype, worker: Worker) -> None:
    """Results in the dtype of x, gradients each in its own, as exact as that is."""
    op, lengths = OPS[name], [40, 0, 900]
    x, *parameters = op.operands(lengths, dtype)
    operands = [x.detach(), *(p.detach().float() for p in parameters)]
    (out,), grads = worker.call("call_function", "interpreted", "run_op", name, lengths, operands)
    a, b = both(lengths)
    same, same_grads = with_gradients(lambda *t: op.run(a, b, *t), operands)
    assert [t.dtype for t in (out, *grads)] == [dtype, dtype, *(p.dtype for p in operands[1:])]
    exact = op.loop(lengths, others(lengths), *(t.double() for t in operands))
    assert isinstance(exact, Tensor)
    torch.testing.assert_close(out.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(out, same[0])
    for got, wanted in zip(grads[1:], same_grads[1:], strict=True):  # sums of 940 float32 products of about 1
        torch.testing.assert_close(got, wanted, rtol=0, atol=940 * torch.finfo(torch.float32).eps)


LENGTHS = [150, 0, 1, 64, 65, 300]
"""Under, at and over every block size in use."""
T, S, LONG = sum(LENGTHS), len(LENGTHS), 290
OTHER = [290, 40, 0, 1, 64, 90]
U = sum(OTHER)
A, B = offsets_of(LENGTHS), offsets_of(OTHER, torch.int32)
ENTRIES = int(product(A, B)[-1])
STARTS = torch.tensor([100, 0, 500, 100, 2, 0])
PICKED = offsets_of([80, 40, 80, 10, 300, 1])
D, E, M = 70, 33, 37
"""Over one tile, not a power of 2, and odd."""


def r(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def softmax_of(t: Tensor, offsets: Tensor) -> Tensor:
    return OPERATORS["segment_softmax"].kernel(t, offsets)


def attention() -> tuple[Any, ...]:
    """Arguments of the backward: the output and the log-sum-exp must be those of the forward."""
    query, key, value, bias = r(S, M, D) / 8, r(T, D), r(T, E), r(S, 310, M)
    out, lse = OPERATORS["target"].kernel(query, key, value, bias, A, 0.5)
    return r(S, M, E), query, key, value, bias, out, lse, A, 0.5


DIRECT: dict[str, tuple[tuple[Any, ...], int]] = {
    "segment_softmax": ((r(T, D), A), 4),
    "segment_softmax_backward": ((r(T, D), softmax_of(r(T, D), A), A), 300),
    "times_dense": ((r(T, D), r(S, D, E), A), D),
    "times_dense, transposed": ((r(T, D), r(S, E, D).transpose(1, 2), A), D),
    "gram": ((r(T, D), r(T, E), A), 300),
    "add_up": ((r(T, 2, 35), A), 300),
    "extreme": ((r(T, D), A, True, 0.0), 0),
    "extreme, smallest, -1 where empty": ((r(T), A, False, -1.0), 0),
    "extreme_backward": ((r(S, D), r(T, D), OPERATORS["extreme"].kernel(r(T, D), A, True, 0.0), A), 1),
    "spread": ((r(S, 300), A, T), 0),
    "pad": ((r(T, 2, 3), A, None, 1.5), 0),
    "pad, cut": ((r(T, 300), A, 7, 1.5), 0),
    "unpad": ((r(S, LONG, 5), A, None, True), 0),
    "multiply": ((r(T, D), r(S, LONG, D), A, True), 1),
    "padded_product": ((r(T, D), r(T, D), A, LONG), 1),
    "take": ((r(T, D), STARTS, PICKED, None), 0),
    "put": ((r(int(PICKED[-1]), D), STARTS, PICKED, T), 6),
    "interleave": (([r(T, D), r(U, D), r(T, D)], [A, B, A]), 0),
    "outer": ((r(T, D), r(U, D), A, B, None), D),
    "times_packed": ((r(ENTRIES), r(U, D), A, B, False, None), 290),
    "times_packed, transposed": ((r(ENTRIES), r(T, D), A, B, True, None), 300),
    "matrix_softmax": ((r(ENTRIES), A, B, 1), 4),
    "matrix_softmax, dim 0": ((r(ENTRIES), A, B, 0), 4),
    "matrix_softmax_backward": ((r(ENTRIES), r(ENTRIES, seed=1).sigmoid(), A, B, 1), 290),
    "matrix_softmax_backward, dim 0": ((r(ENTRIES), r(ENTRIES, seed=1).sigmoid(), A, B, 0), 300),
    "target": ((r(S, M, D) / 8, r(T, D), r(T, E), r(S, 310, M), A, 0.5), D + 300),
    "target, no bias": ((r(S, M, D) / 8, r(T, D), r(T, E), None, A, 1.0), D + 300),
    "target_backward": (attention(), D + 300),
}
"""Operators with arguments in float64, and the number of products or steps that float32 sums up at most."""


def cast(arguments: Any, dtype: torch.dtype) -> Any:
    if isinstance(arguments, tuple | list):
        return type(arguments)(cast(x, dtype) for x in arguments)
    is_real = isinstance(arguments, Tensor) and arguments.is_floating_point()
    return arguments.to(dtype) if is_real else arguments


def tuple_of(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DIRECT)
def test_over_several_tiles(name: str, dtype: torch.dtype, worker: Worker) -> None:
    operator, (arguments, terms) = OPERATORS[name.split(",")[0]], DIRECT[name]
    rounded = cast(arguments, dtype)
    if name == "target_backward":  # the log-sum-exp stays in float32
        rounded = (*rounded[:6], arguments[6].float(), *rounded[7:])
    got = worker.call("call_function", "interpreted", "run_operator", operator.name, rounded)
    same, exact = tuple_of(operator.kernel(*rounded)), tuple_of(operator.kernel(*cast(rounded, torch.float64)))
    for i, (x, y, z) in enumerate(zip(got, same, exact, strict=True)):
        assert x.shape == z.shape
        check_error(x, y, z, f"result {i}", products=terms)


@pytest.mark.parametrize("center", [True, False], ids=["mean and variance", "mean square"])
def test_standardize_over_several_tiles(center: bool, worker: Worker) -> None:
    """In float32 only, which half precision is converted to."""
    values, grad = (r(T, 40, seed=i).float() + 1 for i in (0, 1))
    out, factors = worker.call("call_function", "interpreted", "run_operator", "standardize", (values, A, 1e-5, center))
    plain, back = OPERATORS["standardize"].kernel, OPERATORS["standardize_backward"].kernel
    same, exact = plain(values, A, 1e-5, center), plain(values.double(), A, 1e-5, center)
    for x, y, z in zip((out, factors), same, exact, strict=True):
        check_error(x, y, z, products=4)
    arguments = (grad, out, factors, A, center)
    (got,) = worker.call("call_function", "interpreted", "run_operator", "standardize_backward", arguments)
    check_error(got, back(*arguments), back(*cast(arguments, torch.float64)), products=40)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float64, torch.complex64], ids=str)
def test_any_bits_are_moved(dtype: torch.dtype, worker: Worker) -> None:
    values = (r(T, 3) * 2**20).to(dtype)
    padded = OPERATORS["pad"].kernel(values, A, 40, 1.0)
    for name, arguments in {
        "pad": (values, A, 40, 1.0),
        "unpad": (padded, A, T, True),
        "take": (values, STARTS, PICKED, None),
        "spread": (values[:S], A, T),
        "interleave": ([values, values], [A, A]),
    }.items():
        (got,) = worker.call("call_function", "interpreted", "run_operator", name, arguments)
        wanted = OPERATORS[name].kernel(*arguments)
        assert got.dtype == dtype
        assert torch.equal(got, wanted), name


def test_nan_and_infinity_stay_in_their_column_and_segment(worker: Worker) -> None:
    x = torch.tensor([[1.0, -torch.inf], [torch.nan, -torch.inf], [2.0, 3.0], [-torch.inf, 5.0], [4.0, torch.inf]])
    offsets = offsets_of([2, 3])
    for name, more in {"segment_softmax": (), "add_up": (), "extreme": (True, 0.0)}.items():
        (got,) = worker.call("call_function", "interpreted", "run_operator", name, (x, offsets, *more))
        torch.testing.assert_close(got, OPERATORS[name].kernel(x, offsets, *more), equal_nan=True)
    best = OPERATORS["extreme"].kernel(x, offsets, True, 0.0)
    arguments = (torch.ones(2, 2), x, best, offsets)
    (got,) = worker.call("call_function", "interpreted", "run_operator", "extreme_backward", arguments)
    assert torch.equal(got, OPERATORS["extreme_backward"].kernel(*arguments))


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.segments])
def test_nan_stays_in_its_segment(name: str, worker: Worker) -> None:
    """The operands of segment 1 are NaN: the results and gradients of all other segments are bitwise the same."""
    op, lengths = OPS[name], [5, 12, 0, 8]
    other = others(lengths)
    sizes = {"S": [1] * 4, "T": lengths, "U": other}
    sizes |= {letter: [n * m for n, m in zip(x, other, strict=True)] for letter, x in (("P", lengths), ("Q", other))}
    clean = [t.detach() for t in op.operands(lengths, torch.float32)]
    dirty = [t.clone() for t in clean]
    for t, shape in zip(dirty, op.shapes, strict=True):
        if isinstance(shape[0], str):
            t.split(sizes[shape[0]])[1].fill_(torch.nan)
    kept = [worker.call("call_function", "interpreted", "run_op", name, lengths, x) for x in (clean, dirty)]
    layouts = [sizes[op.segments.upper()], *(sizes.get(str(shape[0])) for shape in op.shapes)]
    for x, y, layout in zip(*([*results, *grads] for results, grads in kept), layouts, strict=True):
        for s in (0, 2, 3) if layout else ():  # without a layout: a parameter that all segments share
            assert torch.equal(x.split(layout)[s], y.split(layout)[s])


def test_softmax_after_a_tile_of_minus_infinity(worker: Worker) -> None:
    x = r(2000, 3).float()
    x[:1500, 1] = -torch.inf
    (got,) = worker.call("call_function", "interpreted", "run_operator", "segment_softmax", (x, offsets_of([2000])))
    check_error(got, softmax_of(x, offsets_of([2000])), softmax_of(x.double(), offsets_of([2000])), products=4)


def test_sums_of_long_segments_keep_their_precision(worker: Worker) -> None:
    """As of the plain kernel: one number after the other would be off by thousands of roundings."""
    x, offsets = torch.rand(200_003, 2, generator=torch.Generator().manual_seed(0)), offsets_of([200_000, 3])
    (got,) = worker.call("call_function", "interpreted", "run_operator", "add_up", (x, offsets))
    exact = torch.stack([part.double().sum(0) for part in x.split([200_000, 3])])
    assert float(((got - exact) / exact).abs().max()) < 32 * torch.finfo(torch.float32).eps


def test_the_plain_kernels_are_out_of_reach(worker: Worker) -> None:
    """So the tests above test what they say: float64 has no Triton kernel, and nothing stands in for it."""
    with pytest.raises(CodegenError, match="NotImplemented"):
        worker.call("call_function", "interpreted", "run_operator", "add_up", (r(T, D), A))
