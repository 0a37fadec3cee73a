"""Every ragged op against a loop over segments: values, gradients, edges, isolation, half precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import EDGE_LENGTHS, check_error, jagged
from hypothesis import given
from hypothesis import strategies as st
from ops_table import OPS, Op, Result, both, others
from torch import Tensor

from flexjag import Jagged, ops
from flexjag.errors import LayoutError
from flexjag.ops import packed
from flexjag.ops.select import take
from flexjag.testing import lengths as lengths_strategy

EPS = torch.finfo(torch.float64).eps


def tuple_of(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def with_gradients(call: Callable[..., Result], operands: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The results of a call, and its gradients along fixed random directions; None as zeros."""
    leaves = [t.detach().requires_grad_() for t in operands]
    results = tuple_of(call(*leaves))
    generator = torch.Generator().manual_seed(7)
    directions = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.device, r.dtype) for r in results]
    found = torch.autograd.grad(results, leaves, directions, allow_unused=True, materialize_grads=True)
    return [r.detach() for r in results], list(found)


def agree(op: Op, lengths: list[int], offset_dtype: torch.dtype = torch.int64, seed: int = 0) -> None:
    """float64 against the loop: only the order of the sums may differ, of values of about 1."""
    operands = op.operands(lengths, seed=seed)
    a, b = both(lengths, offset_dtype)
    got, got_grads = with_gradients(lambda *t: op.run(a, b, *t), operands)
    want, want_grads = with_gradients(lambda *t: op.loop(lengths, others(lengths), *t), operands)
    terms = sum(lengths) + 64
    for found, wanted in zip([*got, *got_grads], [*want, *want_grads], strict=True):
        assert found.shape == wanted.shape
        largest = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(found, wanted, rtol=0, atol=2 * terms * EPS * max(largest, 1.0) ** 2)


@pytest.mark.parametrize("short", [0, 10**6], ids=["a call per segment", "one index"])
@pytest.mark.parametrize("lengths", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS)
@pytest.mark.parametrize("name", OPS)
def test_equals_a_loop_at_the_edges(name: str, lengths: list[int], short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SHORT", short)
    agree(OPS[name], lengths, torch.int32 if len(lengths) % 2 else torch.int64)


@pytest.mark.parametrize("name", OPS)
@given(lengths=lengths_strategy(max_total=90), seed=st.integers(0, 99), short=st.sampled_from([0, 10, 10**6]))
def test_equals_a_loop(name: str, lengths: list[int], seed: int, short: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "SHORT", short)
        agree(OPS[name], lengths, seed=seed)


@pytest.mark.parametrize("name", OPS)
def test_gradients_are_right(name: str) -> None:
    lengths = [3, 0, 1, 6, 0]
    a, b = both(lengths)
    assert torch.autograd.gradcheck(lambda *t: OPS[name].run(a, b, *t), OPS[name].operands(lengths))


NEEDED = ("softmax", "max", "min", "attention")
"""In names of ops whose gradients need their results."""


@pytest.mark.parametrize("name", [name for name in OPS if not any(part in name for part in NEEDED)])
def test_results_may_be_changed_in_place(name: str) -> None:
    a, b = both([2, 0, 3])
    op, operands = OPS[name], OPS[name].operands([2, 0, 3])
    results = tuple_of(op.run(a, b, *operands))
    want = torch.autograd.grad([r.sum() for r in results], operands)
    results = tuple_of(op.run(a, b, *operands))
    got = torch.autograd.grad([r.mul_(2.0).sum() for r in results], operands)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, 2 * y)


@pytest.mark.parametrize("shape", [(5,), (5, 2, 3)], ids=str)
def test_sums_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, requires_grad=True)
    ops.segment_sum(Jagged.from_lengths(x, [2, 3])).mul_(2.0).sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 2).all())


@pytest.mark.parametrize("lengths", [[40, 0, 7, 33], [45, 48]], ids=["short", "long"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_rounds_no_worse_than_the_loop(name: str, dtype: torch.dtype, lengths: list[int]) -> None:
    op, (a, b) = OPS[name], both(lengths)
    operands = op.operands(lengths, dtype)
    exact = [t.double() for t in operands]
    got = with_gradients(lambda *t: op.run(a, b, *t), operands)
    same = with_gradients(lambda *t: op.loop(lengths, others(lengths), *t), operands)
    true = with_gradients(lambda *t: op.loop(lengths, others(lengths), *t), exact)
    for kind, found, own, wanted in zip(("result", "gradient"), got, same, true, strict=True):
        for i, (x, y, z) in enumerate(zip(found, own, wanted, strict=True)):
            check_error(x, y, z, f"{kind} {i}", products=sum(lengths))


HALVES = [torch.bfloat16, torch.float16]
NORMS = [name for name in OPS if "norm" in name]


def sums_of_products(
    call: Callable[..., Tensor], loop: Callable[..., Tensor], operands: list[Tensor], learned: list[int]
) -> None:
    """Check the gradients of the `learned` operands along one positive direction: float64's, rounded once.

    `call` and `loop` take the same operands, `loop` in float64. All operands count as they are, in their own dtypes.
    """
    leaves, exact = (
        [t.detach().to(kind or t.dtype).requires_grad_() for t in operands] for kind in (None, torch.float64)
    )
    out, wide = call(*leaves), loop(*exact)
    generator = torch.Generator().manual_seed(7)
    direction = torch.rand(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    got = torch.autograd.grad(out, [leaves[i] for i in learned], direction)
    wanted = torch.autograd.grad(wide, [exact[i] for i in learned], direction.double())
    for x, y, i in zip(got, wanted, learned, strict=True):
        assert x.dtype == operands[i].dtype
        # Half a unit of rounding. Before it, sums of n float32 terms of about 1 pass through √n + |y|, and n roundings
        # of that come to √n.
        root = out.shape[0] ** 0.5
        error = 0.51 * torch.finfo(x.dtype).eps * y.abs() + root * torch.finfo(torch.float32).eps * (root + y.abs())
        assert bool(((x.double() - y).abs() <= error).all()), f"operand {i}: {x}, not {y}"


@pytest.mark.parametrize("learned", [None, torch.float32], ids=["alike", "float32"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_parameters_of_norms_learn_beside_half_precision(
    name: str, dtype: torch.dtype, learned: torch.dtype | None
) -> None:
    """Thousands of tokens in one sum: added up in half precision it would be off by up to 87 %."""
    lengths = [2500, 0, 1500]
    op, (a, b) = OPS[name], both(lengths)
    x, *parameters = op.operands(lengths, dtype)
    operands = [x, *(p.to(learned or dtype) for p in parameters)]
    out = op.run(a, b, *operands)
    assert isinstance(out, Tensor)
    assert out.dtype == dtype
    exact = op.loop(lengths, others(lengths), *(t.double() for t in operands))
    # One rounding of the result; what float32 loses on the way in sums of thousands of squares is far less.
    torch.testing.assert_close(out.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)
    sums_of_products(
        lambda *t: op.run(a, b, *t),  # pyright: ignore[reportArgumentType]
        lambda *t: op.loop(lengths, others(lengths), *t),  # pyright: ignore[reportArgumentType]
        operands,
        list(range(1, len(operands))),
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("lengths", [[40, 0, 35], [3000, 0, 2000]], ids=["short", "long"])
def test_rows_of_segments_learn_in_half_precision(lengths: list[int], dtype: torch.dtype) -> None:
    """What all tokens of a segment share gets their sum: a row, a matrix, a segment that is taken many times."""
    offsets, x = both(lengths)[0], jagged(lengths, 3, dtype=dtype)
    rows = jagged([3], 3, dtype=dtype, seed=1).values
    sums_of_products(
        lambda r: ops.segment_broadcast(r, x).values,
        lambda r: r.repeat_interleave(offsets.diff(), 0),
        [rows],
        [0],
    )
    matrices = jagged([3], 3, 2, dtype=dtype, seed=2).values
    sums_of_products(
        lambda x, y: ops.jagged_dense_bmm(Jagged(x, offsets), y).values,
        lambda x, y: torch.cat([t @ m for t, m in zip(x.split(lengths), y, strict=True)]),
        [x.values, matrices],
        [1],
    )
    picked, few = torch.zeros(2000, dtype=torch.int64), [max(lengths) // 60 + 3, 2]
    small = jagged(few, 3, dtype=dtype, seed=3)
    sums_of_products(
        lambda x: ops.jagged_index_select(small.with_values(x), picked).values,
        lambda x: x[: few[0]].repeat(2000, 1),
        [small.values],
        [0],
    )


def test_ties_are_counted_past_what_half_precision_counts() -> None:
    """70,000 equal tokens and many empty segments: float16 would count infinitely many."""
    x = torch.ones(70_000, dtype=torch.float16, requires_grad=True)
    (got,) = torch.autograd.grad(ops.segment_max(Jagged.from_lengths(x, [70_000] + [0] * 3000))[0], x)
    assert torch.equal(got, torch.full_like(x, 1 / 70_000))


@pytest.mark.parametrize("short", [0, 10**6], ids=["a call per segment", "one index"])
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.segments])
def test_nan_stays_in_its_segment(name: str, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operands of segment 1 are NaN: the results and gradients of all other segments are bitwise the same."""
    monkeypatch.setattr(packed, "SHORT", short)
    lengths = [5, 12, 0, 8]
    op, (a, b) = OPS[name], both(lengths)
    other = others(lengths)
    products = [[n * m for n, m in zip(x, other, strict=True)] for x in (lengths, other)]
    sizes = {"S": [1] * 4, "T": lengths, "U": other, "P": products[0], "Q": products[1]}
    clean = op.operands(lengths)
    dirty = [t.detach().clone() for t in clean]
    for t, shape in zip(dirty, op.shapes, strict=True):
        if isinstance(shape[0], str):
            t.split(sizes[shape[0]])[1].fill_(torch.nan)
    kept = [with_gradients(lambda *t: op.run(a, b, *t), x) for x in (clean, dirty)]
    layouts = [sizes[op.segments.upper()], *(sizes.get(str(shape[0])) for shape in op.shapes)]
    for x, y, layout in zip(*([*results, *grads] for results, grads in kept), layouts, strict=True):
        if layout is None:
            continue  # a parameter that all segments share
        for s in (0, 2, 3):
            assert torch.equal(x.split(layout)[s], y.split(layout)[s])


@pytest.mark.parametrize("short", [0, 10**6], ids=["a call per segment", "one index"])
@pytest.mark.parametrize("name", OPS)
def test_every_entry_is_written_and_no_kernel_is_nondeterministic(
    name: str, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this mode PyTorch fills fresh memory with NaN, and raises where it knows no deterministic kernel."""
    monkeypatch.setattr(packed, "SHORT", short)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        agree(OPS[name], [0, 5, 40, 0, 0, 3])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", OPS)
def test_strides_do_not_matter(name: str) -> None:
    lengths = [5, 0, 12, 40]
    op, (a, b) = OPS[name], both(lengths)
    operands = op.operands(lengths)
    strided = [t.detach().repeat_interleave(2, -1)[..., ::2] for t in operands]
    got, want = (with_gradients(lambda *t: op.run(a, b, *t), x) for x in (strided, operands))
    for found, wanted in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        largest = float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=0, atol=2 * sum(lengths) * EPS * max(largest, 1.0))


@pytest.mark.parametrize("name", ["segment_max", "segment_min"])
@pytest.mark.parametrize("short", [0, 10**6], ids=["a call per segment", "one index"])
def test_nan_wins(name: str, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SHORT", short)
    x = torch.tensor([1.0, torch.nan, 2.0, torch.nan, 5.0], requires_grad=True)
    out = getattr(ops, name)(Jagged.from_lengths(x, [4, 1]))
    assert out.isnan().tolist() == [True, False]
    out.backward(torch.tensor([6.0, 1.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 3.0, 0.0, 3.0, 1.0]


def test_no_index_selects_nothing() -> None:
    out = ops.jagged_index_select(Jagged.from_lengths(torch.ones(3, 2), [1, 2]), torch.zeros(0, dtype=torch.int64))
    assert out.values.shape == (0, 2)
    assert out.num_segments == 0


@pytest.mark.parametrize("short", [0, 10**6], ids=["a call per segment", "one index"])
def test_ties_share_the_gradient(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SHORT", short)
    x = torch.tensor([1.0, 2.0, 2.0, 5.0], requires_grad=True)
    ops.segment_max(Jagged.from_lengths(x, [3, 1])).backward(torch.tensor([6.0, 1.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 3.0, 3.0, 1.0]


def test_integers_are_moved_and_reduced_exactly() -> None:
    x = Jagged.from_lengths(torch.tensor([2**40, 1, 7, 9]), [1, 0, 3])
    assert ops.jagged_to_padded_dense(x, 2, -1).tolist() == [[2**40, -1], [-1, -1], [1, 7]]
    assert ops.dense_to_jagged(ops.jagged_to_padded_dense(x), x.offsets).values.tolist() == x.values.tolist()
    assert ops.jagged_index_select(x, torch.tensor([2, 2])).values.tolist() == [1, 7, 9, 1, 7, 9]
    assert ops.segment_sum(x).tolist() == [2**40, 0, 17]
    assert ops.segment_min(x, -5).tolist() == [2**40, -5, 1]


@pytest.mark.parametrize("shape", [(), (2, 3)], ids=str)
def test_sums_of_long_segments_keep_their_precision(shape: tuple[int, ...]) -> None:
    """A sum of n float32 numbers one after the other may be off by n roundings; the sum here stays at a few."""
    x = Jagged.from_lengths(torch.rand(200_003, *shape), [200_000, 3])
    got, exact = ops.segment_sum(x).double(), ops.segment_sum(x.map(Tensor.double))
    assert float(((got - exact) / exact).abs().max()) < 32 * torch.finfo(torch.float32).eps


def test_split_undoes_concat() -> None:
    parts = [jagged(n, 3) for n in ([4, 0, 2], [0, 0, 5], [1, 7, 0])]
    found = ops.jagged_split(ops.jagged_concat(parts), [p.lengths for p in parts[:2]], totals=[6, 5])
    for got, wanted in zip(found, parts, strict=True):
        assert torch.equal(got.values, wanted.values)
        assert torch.equal(got.offsets, wanted.offsets)


@pytest.mark.parametrize("lengths", [[40, 0, 35], [3, 0, 2]], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.uint64, torch.float8_e4m3fn, torch.int8, torch.complex64], ids=str
)
def test_padding_takes_any_dtype(dtype: torch.dtype, lengths: list[int]) -> None:
    """Also those for which PyTorch has no index_copy on a CPU."""
    values = torch.randint(0, 100, (sum(lengths), 3)).to(torch.float32).to(dtype)
    x = Jagged.from_lengths(values, lengths)
    for size in (45, 2):
        dense = ops.jagged_to_padded_dense(x, size)
        assert dense.dtype == dtype
        for row, piece in zip(dense, values.split(lengths), strict=True):
            kept = piece[:size]
            assert torch.equal(row[: len(kept)].view(torch.uint8), kept.view(torch.uint8))
            assert not bool(row[len(kept) :].view(torch.uint8).any())
    back = ops.dense_to_jagged(ops.jagged_to_padded_dense(x, 45), x.offsets).values
    assert torch.equal(back.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize(("offsets", "rule"), [([0, 3, 2], "must not decrease"), ([1, 2, 3], "must start at 0")])
def test_ranges_of_bad_offsets_are_refused(offsets: list[int], rule: str) -> None:
    with pytest.raises(LayoutError, match=rule):
        take(torch.randn(5, 2), torch.tensor([0, 1]), torch.tensor(offsets), None)
