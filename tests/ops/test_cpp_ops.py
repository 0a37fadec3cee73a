"""The C++ kernels of ops against the plain ones: values, gradients, edges, isolation, threads, and when they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cases import EDGE_LENGTHS, check_error
from hypothesis import given
from hypothesis import strategies as st
from ops_table import OPS, both, offsets_of
from test_ops import agree, with_gradients
from torch import Tensor

from flexjag import Jagged, ops
from flexjag.errors import BuildError, LayoutError
from flexjag.kernels.cpp import build
from flexjag.ops.cpp import common
from flexjag.ops.cpp import softmax as softmax_cpp
from flexjag.ops.softmax import segment_softmax, segment_softmax_backward
from flexjag.ops.target import target, target_backward

NAMES = [name for name in OPS if name.startswith(("jagged_softmax", "jagged_dense_attention"))]
LANES = 16
KEY_BLOCK, QUERIES = 96, 48  # of the kernels, in float32
HALVES = (torch.bfloat16, torch.float16)


def always(patch: pytest.MonkeyPatch) -> None:
    """Every call runs the kernels, which are compiled at once."""
    for where, name, value in ((common, "ENOUGH", 0.0), (common, "LEAST", 0.0), (softmax_cpp, "FEW", 1)):
        patch.setattr(where, name, value)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if build.refusal() is not None:
        pytest.skip(str(build.refusal()))
    always(monkeypatch)


@pytest.fixture
def new_cache(kernels: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, in a process that has built nothing."""
    monkeypatch.setenv("FLEXJAG_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_state", build._State())
    monkeypatch.setattr(common, "_spent", {})
    return tmp_path / "cpp"


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def target_operands(lengths: list[int], sizes: tuple[int, int, int], biased: bool, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value, bias and a gradient of the output, of sizes M, D and E."""
    queries, dim, value_dim = sizes
    s, t, longest = len(lengths), sum(lengths), max(lengths, default=0) + 3
    shapes = [(s, queries, dim), (t, dim), (t, value_dim), (s, longest, queries), (s, queries, value_dim)]
    found = [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    return found if biased else [*found[:3], found[4]]


def run_target(operands: list[Tensor], offsets: Tensor, forward: Callable, backward: Callable) -> list[Tensor]:
    """Output and gradients by a pair of kernels."""
    query, key, value, *bias, grad = operands
    given = (query, key, value, bias[0] if bias else None)
    out, lse = forward(*given, offsets, 0.5)
    return [out, *backward(grad, *given, out, lse, offsets, 0.5)[: 3 + len(bias)]]


def run_softmax(x: Tensor, grad: Tensor, offsets: Tensor, forward: Callable, backward: Callable) -> list[Tensor]:
    out = forward(x, offsets)
    return [out, backward(grad, out, offsets)]


def compare(got: list[Tensor], plain: list[Tensor], exact: list[Tensor], products: int) -> None:
    """No worse than the plain kernels in the same precision, against those in float64."""
    for i, (x, y, z) in enumerate(zip(got, plain, exact, strict=True)):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        check_error(x, y, z, f"result {i}", products=products)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("lengths", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_a_loop_at_the_edges(name: str, lengths: list[int]) -> None:
    agree(OPS[name], lengths, torch.int32 if len(lengths) % 2 else torch.int64)


LENGTHS = st.lists(st.integers(0, 40) | st.sampled_from([95, 96, 97, 200]), max_size=5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@given(lengths=LENGTHS, columns=st.integers(1, 2 * LANES + 1) | st.sampled_from([64, 65, 127, 200]))
def test_softmax_equals_the_plain_kernel(dtype: torch.dtype, lengths: list[int], columns: int) -> None:
    offsets = offsets_of(lengths)
    x, grad = (normal(sum(lengths), columns, dtype=dtype, seed=i) for i in (0, 1))
    got = run_softmax(x, grad, offsets, segment_softmax, segment_softmax_backward)
    plain = run_softmax(x, grad, offsets, segment_softmax.kernel, segment_softmax_backward.kernel)
    exact = run_softmax(x.double(), grad.double(), offsets, segment_softmax.kernel, segment_softmax_backward.kernel)
    compare(got, plain, exact, max(lengths, default=0))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@given(
    lengths=LENGTHS,
    queries=st.integers(1, 2 * LANES + 1) | st.sampled_from([QUERIES, QUERIES + 1, 100]),
    dims=st.tuples(*[st.sampled_from([1, 5, 8, LANES, 40, 64, 80])] * 2),
)
def test_target_equals_the_plain_kernel(
    dtype: torch.dtype, biased: bool, lengths: list[int], queries: int, dims: tuple[int, int]
) -> None:
    offsets, operands = offsets_of(lengths), target_operands(lengths, (queries, *dims), biased, dtype)
    got = run_target(operands, offsets, target, target_backward)
    plain = run_target(operands, offsets, target.kernel, target_backward.kernel)
    exact = run_target([x.double() for x in operands], offsets, target.kernel, target_backward.kernel)
    compare(got, plain, exact, max([*lengths, queries, *dims]))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_both_orders_are_right(name: str) -> None:
    lengths = [3, 0, 1, 6, 0]
    a, b = both(lengths)

    def run(*t: Tensor) -> Tensor:
        out = OPS[name].run(a, b, *t)
        assert isinstance(out, Tensor)
        return out

    operands = OPS[name].operands(lengths)
    assert torch.autograd.gradcheck(run, operands)
    if name != "jagged_dense_attention":  # its bias has many entries; with a scale it has none
        assert torch.autograd.gradgradcheck(run, operands)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", NAMES)
def test_every_entry_is_written(name: str) -> None:
    """In this mode PyTorch fills fresh memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        agree(OPS[name], [0, 5, 40, 0, 0, 3])
        agree(OPS[name], [0, 0])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name: str) -> None:
    lengths = [5, 0, 12, 40]
    op, (a, b) = OPS[name], both(lengths)
    operands = op.operands(lengths)
    strided = [t.detach().repeat_interleave(2, -1)[..., ::2] for t in operands]
    wide = [torch.cat([t.detach(), t.detach()], -1)[..., : t.shape[-1]] for t in operands]  # of a joint projection
    want = with_gradients(lambda *t: op.run(a, b, *t), operands)
    for other in (strided, wide):
        got = with_gradients(lambda *t: op.run(a, b, *t), other)
        for found, wanted in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
            assert torch.equal(found, wanted)


def alone(x: Tensor, lengths: list[int], segment: int) -> Tensor:
    return x.split(lengths)[segment]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("sizes", [(1, 5, 7), (1, LANES, LANES)], ids=str)
def test_a_contiguous_tensor_may_have_any_stride_where_its_size_is_1(sizes: tuple[int, int, int]) -> None:
    """As that of a transposed ``[1, S, D]``."""
    lengths = [1, 0, 1, 1]
    operands = target_operands(lengths, sizes, True, torch.float64)
    operands[3] = operands[3][:, :1].contiguous()
    odd = [
        x.as_strided(x.shape, [999 if n == 1 else m for n, m in zip(x.shape, x.stride(), strict=True)])
        for x in operands
    ]
    assert all(x.is_contiguous() for x in odd)
    wanted = run_target(operands, offsets_of(lengths), target, target_backward)
    for x, y in zip(run_target(odd, offsets_of(lengths), target, target_backward), wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("columns", [1, 3, 64, 100])
def test_segments_of_a_softmax_know_nothing_of_each_other(columns: int) -> None:
    """Bitwise: NaN in others, and being alone, change nothing."""
    lengths = [50, 97, 0, 3]
    x, grad = (normal(150, columns, dtype=torch.float32, seed=i) for i in (0, 1))
    kernels = segment_softmax, segment_softmax_backward
    want = run_softmax(x, grad, offsets_of(lengths), *kernels)
    dirty, of_dirty = x.clone(), grad.clone()
    dirty[50:147], of_dirty[50:147] = torch.nan, torch.inf
    got = run_softmax(dirty, of_dirty, offsets_of(lengths), *kernels)
    for s in (0, 3):
        own = run_softmax(alone(x, lengths, s), alone(grad, lengths, s), offsets_of([lengths[s]]), *kernels)
        for whole, mixed, single in zip(want, got, own, strict=True):
            assert torch.equal(alone(whole, lengths, s), alone(mixed, lengths, s))
            assert torch.equal(alone(whole, lengths, s), single)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("queries", [1, 5, 20, 60])
def test_segments_of_target_attention_know_nothing_of_each_other(queries: int) -> None:
    lengths = [50, 97, 0, 103]
    operands = target_operands(lengths, (queries, 20, 40), True, torch.float32)
    want = run_target(operands, offsets_of(lengths), target, target_backward)
    packed = [False, True, True, False, False]
    dirty = [x.clone() for x in operands]
    for x, is_packed in zip(dirty, packed, strict=True):
        (x.split(lengths) if is_packed else x)[1].fill_(torch.nan)
    got = run_target(dirty, offsets_of(lengths), target, target_backward)
    layout = [False, False, True, True, False]  # of the output and the gradients
    for s in (0, 2, 3):
        single = [alone(x, lengths, s) if y else x[s : s + 1] for x, y in zip(operands, packed, strict=True)]
        own = run_target(single, offsets_of([lengths[s]]), target, target_backward)
        for whole, mixed, one, is_packed in zip(want, got, own, layout, strict=True):
            parts = [alone(x, lengths, s) if is_packed else x[s : s + 1] for x in (whole, mixed)]
            assert torch.equal(parts[0], parts[1])
            assert torch.equal(parts[0], one)


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(common, "GRAIN", 1)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("kernels")
def test_threads_change_nothing(three_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [50, 97, 0, 103, 1, 7, 8]
    offsets, operands = offsets_of(lengths), target_operands(lengths, (5, 20, 40), True, torch.float32)
    x, grad = (normal(sum(lengths), 150, dtype=torch.float32, seed=i) for i in (0, 1))

    def run() -> list[Tensor]:
        found = run_softmax(x, grad, offsets, segment_softmax, segment_softmax_backward)
        return found + run_target(operands, offsets, target, target_backward)

    many, again = run(), run()
    torch.set_num_threads(1)
    for three, repeated, one in zip(many, again, run(), strict=True):
        assert torch.equal(three, repeated)
        assert torch.equal(three, one)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("columns", [1, 20])
def test_infinite_scores_are_as_in_torch(columns: int) -> None:
    x = torch.zeros(12, columns)
    x[1], x[4], x[6:9] = -torch.inf, torch.inf, -torch.inf
    x[9], x[10] = 1e30, -1e30
    offsets = offsets_of([3, 3, 3, 3])
    torch.testing.assert_close(segment_softmax(x, offsets), segment_softmax.kernel(x, offsets), equal_nan=True)
    query, key = torch.ones(4, 2, 1), x[:, :1]
    given = (query, key, torch.ones(12, 1), None, offsets, 1.0)
    torch.testing.assert_close(target(*given)[0], target.kernel(*given)[0], equal_nan=True)


@pytest.mark.usefixtures("kernels")
def test_wrong_offsets_and_short_biases_are_named() -> None:
    x = torch.zeros(6, 20)
    for offsets, rule in (([0, 4, 3, 6], "must not decrease"), ([1, 6], "must start at 0"), ([0, 7], "must end at")):
        with pytest.raises(LayoutError, match=rule):
            segment_softmax(x, torch.tensor(offsets))
        with pytest.raises(LayoutError, match=rule):
            target(torch.zeros(len(offsets) - 1, 2, 20), x, x, None, torch.tensor(offsets), 1.0)
    with pytest.raises(LayoutError, match="row for every position"):
        ops.jagged_dense_attention(
            torch.zeros(2, 1, 20), *[Jagged.from_lengths(x, [1, 5])] * 2, bias=torch.zeros(2, 4, 1)
        )


def test_a_kernel_is_compiled_when_calls_have_taken_as_long(new_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, offsets = normal(100, 20, dtype=torch.float32), offsets_of([40, 60])
    text = common.unit("softmax", torch.float32)
    monkeypatch.setattr(common, "ENOUGH", 2.5 * (2 * softmax_cpp.PER_SEGMENT + 2000 * softmax_cpp.PER_NUMBER))
    for _ in range(2):
        assert torch.equal(segment_softmax(x, offsets), segment_softmax.kernel(x, offsets))
        assert not build.is_built(text)
    segment_softmax(x, offsets)
    assert build.is_built(text)
    monkeypatch.setattr(build, "_state", build._State())  # as another process
    monkeypatch.setattr(common, "_spent", {})
    assert common.find("softmax", torch.float32, 1e-3) is not None


def test_small_calls_look_for_nothing(new_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "LEAST", 1.0)
    ops.jagged_softmax(Jagged.from_lengths(torch.zeros(100, 20), [40, 60]))
    assert not new_cache.exists()


@pytest.mark.usefixtures("kernels")
def test_the_plain_kernel_runs_where_none_is_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    x, offsets = normal(100, 20, dtype=torch.float32), offsets_of([40, 60])
    operands = target_operands([40, 60], (3, 20, 4), True, torch.float32)
    want = run_target(operands, offsets, target.kernel, target_backward.kernel)

    def refused(text: str) -> None:
        raise BuildError("no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "load", refused)
        assert torch.equal(segment_softmax(x, offsets), segment_softmax.kernel(x, offsets))
    monkeypatch.setenv("FLEXJAG_CPP", "0")
    assert torch.equal(segment_softmax(x, offsets), segment_softmax.kernel(x, offsets))
    got = run_target(operands, offsets, target, target_backward)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.usefixtures("kernels")
def test_other_dtypes_and_no_columns_stay_plain() -> None:
    offsets = offsets_of([40, 60])
    assert segment_softmax(torch.zeros(100, 0), offsets).shape == (100, 0)
    out, _ = target(torch.zeros(2, 3, 0), torch.zeros(100, 0), torch.ones(100, 4), None, offsets, 1.0)
    torch.testing.assert_close(out, torch.ones(2, 3, 4))


@pytest.mark.usefixtures("kernels")
def test_graphs_call_the_kernels() -> None:
    lengths = [40, 0, 35]
    x = normal(75, 20, dtype=torch.float32)
    query, offsets = normal(3, 2, 20, dtype=torch.float32), offsets_of(lengths)

    def run(values: Tensor, offsets: Tensor) -> Tensor:
        rows = Jagged(values, offsets)
        weights = ops.jagged_softmax(rows)
        return ops.jagged_dense_attention(query, weights, rows).sum() + weights.values.square().sum()

    leaves = [x.clone().requires_grad_() for _ in range(2)]
    eager = run(leaves[0], offsets)
    made = torch.compile(run, fullgraph=True, backend="aot_eager")(leaves[1], offsets)
    assert torch.equal(eager, made)
    for a, b in zip(*(torch.autograd.grad(y, z) for y, z in zip((eager, made), leaves, strict=True)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=100 * float(torch.finfo(torch.float32).eps))
