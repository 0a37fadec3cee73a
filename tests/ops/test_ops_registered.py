"""What is registered with ``torch.library``: schemas, fakes, gradients; and one graph for all batches."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from typing import Any, NoReturn

import pytest
import torch
from ops_table import LONG, OPS, Op, both, offsets_of, others, product
from test_ops import EPS, tuple_of
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flexjag import Jagged, ops
from flexjag.offsets import mark_varying
from flexjag.ops import bmm, elementwise, matrices, norm, packed, padding, segment, select, softmax, target
from flexjag.ops.register import OPERATORS, Operator
from flexjag.testing import assert_compiles
from flexjag.upstream import opcheck_reads_grads

OTHER_LENGTHS = [3, 0, 4, 1]
A, B = offsets_of([2, 0, 3, 1]), offsets_of(OTHER_LENGTHS)
AB = product(A, B)
T, U, P, S = int(A[-1]), int(B[-1]), int(AB[-1]), 4
STARTS, PICKED = torch.tensor([2, 0, 2]), offsets_of([3, 2, 3])


def r(*shape: int) -> Tensor:
    """Random normal values that need gradients."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def plain(*shape: int) -> Tensor:
    return r(*shape).detach()


REGISTERED: dict[str, tuple[Operator, tuple[object, ...]]] = {
    "pad": (padding.pad, (r(T, 3), A, 4, 1.5)),
    "pad, cut": (padding.pad, (r(T, 3), A, 1, 0.0)),
    "pad, to the longest": (padding.pad, (r(T, 3), A, None, 0.0)),
    "unpad": (padding.unpad, (r(S, 4, 3), A, T, False)),
    "unpad, longer, unknown total": (padding.unpad, (r(S, 2, 3), A, None, True)),
    "multiply": (elementwise.multiply, (r(T, 3), r(S, 4, 3), A, False)),
    "padded_product": (elementwise.padded_product, (r(T, 3), r(T, 3), A, 2)),
    "standardize": (norm.standardize, (r(T, 3), A, 1e-5, True)),
    "standardize, mean square": (norm.standardize, (r(T, 3), A, 1e-5, False)),
    "standardize_backward": (norm.standardize_backward, (plain(T, 3), plain(T, 3), plain(S), A, True)),
    "times_dense": (bmm.times_dense, (r(T, 3), r(S, 3, 2), A)),
    "times_dense, transposed": (bmm.times_dense, (r(T, 3), plain(S, 2, 3).transpose(1, 2).requires_grad_(), A)),
    "gram": (bmm.gram, (r(T, 3), r(T, 2), A)),
    "segment_softmax": (softmax.segment_softmax, (r(T, 3), A)),
    "segment_softmax_backward": (softmax.segment_softmax_backward, (plain(T, 3), plain(T, 3), A)),
    "add_up": (segment.add_up, (r(T, 3), A)),
    "spread": (segment.spread, (r(S, 3), A, T)),
    "extreme": (segment.extreme, (r(T, 3), A, True, 0.0)),
    "extreme_backward": (
        segment.extreme_backward,
        (plain(S, 3), plain(T, 3), segment.extreme(plain(T, 3), A, True, 0.0), A),
    ),
    "outer": (matrices.outer, (r(T, 3), r(U, 3), A, B, None)),
    "outer, known total": (matrices.outer, (r(T, 3), r(U, 3), A, B, P)),
    "times_packed": (matrices.times_packed, (r(P), r(U, 3), A, B, False, None)),
    "times_packed, transposed": (matrices.times_packed, (r(P), r(T, 3), A, B, True, U)),
    "matrix_softmax": (matrices.matrix_softmax, (r(P), A, B, 1)),
    "matrix_softmax_backward": (matrices.matrix_softmax_backward, (plain(P), plain(P), A, B, 0)),
    "take": (select.take, (r(T, 3), STARTS, PICKED, None)),
    "take, known total": (select.take, (r(T, 3), STARTS, PICKED, 8)),
    "put": (select.put, (r(8, 3), STARTS, PICKED, T)),
    "interleave": (select.interleave, ([r(T, 3), r(U, 3)], [A, B])),
    "target": (target.target, (r(S, 2, 3), r(T, 3), r(T, 2), r(S, 4, 2), A, 0.5)),
    "target, no bias": (target.target, (r(S, 2, 3), r(T, 3), r(T, 2), None, A, 1.0)),
    "target_backward": (
        target.target_backward,
        (plain(S, 2, 2), plain(S, 2, 3), plain(T, 3), plain(T, 2), plain(S, 4, 2), plain(S, 2, 2), plain(S, 2), A, 1.0),
    ),
}


@pytest.mark.parametrize("short", [0, 10**6], ids=["a call per segment", "one index"])
@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name: str, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SHORT", short)
    op, arguments = REGISTERED[name]
    with warnings.catch_warnings():
        if opcheck_reads_grads():
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
        torch.library.opcheck(op.overload, arguments)


def test_the_list_above_is_complete() -> None:
    modules = (bmm, elementwise, matrices, norm, padding, segment, select, softmax, target)
    defined = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, Operator) and value.kernel.__module__ == module.__name__
    }
    assert defined == {name.split(",")[0] for name in REGISTERED}


def fail(*args: object) -> NoReturn:
    raise AssertionError("the dispatcher was asked")


@pytest.mark.parametrize("name", OPS)
def test_eager_calls_pass_no_dispatcher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes 5 µs a call, and with ``torch.library``'s gradients 20; a small batch takes 10."""
    for operator in OPERATORS.values():
        monkeypatch.setattr(operator, "overload", fail)
    op = OPS[name]
    a, b = both([2, 0, 3])
    operands = op.operands([2, 0, 3])
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            results = tuple_of(op.run(a, b, *operands))
        assert all(r.requires_grad == grad for r in results)
    torch.autograd.grad([r.sum() for r in results], operands)


class Names(TorchDispatchMode):
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_who_watches_sees_operators() -> None:
    """Modes (fake tensors, selective checkpointing, counters), profilers, and subclasses of tensors."""
    x = Jagged(r(T, 3), A)
    with Names() as mode:
        ops.jagged_softmax(x).values.sum().backward()
    assert {"flexjag.segment_softmax.default", "flexjag.segment_softmax_backward.default"} <= set(mode.seen)
    with torch.profiler.profile(acc_events=True) as profile:  # without, torch 2.11 warns
        ops.jagged_softmax(x)
    assert "flexjag::segment_softmax" in {event.name for event in profile.events() or ()}
    with FakeTensorMode() as fake:
        values, offsets = fake.from_tensor(plain(T, 3)), fake.from_tensor(A)
    assert isinstance(softmax.segment_softmax(values, offsets), FakeTensor)


def test_import_is_light() -> None:
    """Schemas and fakes are registered without Triton and without a compiler, and the ops run without Triton."""
    code = """
        import sys
        import torch
        before = set(sys.modules)
        sys.modules["triton"] = None
        from flexjag import Jagged, ops
        x = Jagged.from_lengths(torch.ones(3, 2, requires_grad=True), [1, 2])
        ops.jagged_softmax(x).values.sum().backward()
        new = (set(sys.modules) - before) & {"torch._dynamo", "torch._inductor"}
        assert not new, new
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


BATCHES = [[9, 0, 23], [40, 3, 5, 8, 0], [17, 49], [6, 6, 6, 6, 6, 6, 6]]


def batches_of(op: Op) -> list[tuple[Tensor, ...]]:
    found = []
    for seed, lengths in enumerate(BATCHES):
        operands = op.operands(lengths, seed=seed)
        for t, shape in zip(operands, op.shapes, strict=True):
            if isinstance(shape[0], str):
                mark_varying(t, 0)
        offsets = both(lengths)
        for o in offsets:
            mark_varying(o, 0)
        found.append((*offsets, *operands))
    return found


@pytest.mark.parametrize("name", OPS)
def test_one_graph_for_all_batches(name: str) -> None:
    op = OPS[name]
    given = batches_of(op)

    def check(index: int, out: object) -> None:
        leaves = given[index][2:]
        got = [t.grad for t in leaves]
        want = tuple_of(op.run(*given[index]))
        grads = torch.autograd.grad([w.sum() for w in want], leaves, allow_unused=True, materialize_grads=True)
        terms = sum(BATCHES[index]) + 64
        for x, y in zip([*tuple_of(out), *got], [*want, *grads], strict=True):
            limit = 2 * terms * EPS * max(1.0, float(y.detach().abs().max())) ** 2
            torch.testing.assert_close(x, y, rtol=0, atol=limit)

    graphs = assert_compiles(op.run, given, backend="aot_eager", after_each=check)
    assert graphs.forward == graphs.backward == [0]


NUM_OPS = 13


def pipeline(x: Jagged, y: Jagged, dense: Tensor, weight: Tensor) -> Tensor:
    """Results of unknown size feed further ops."""
    left, rest = ops.jagged_split(x, [x.lengths // 2])
    x = ops.jagged_concat([ops.jagged_softmax(left), ops.jagged_layer_norm(rest, per="segment")])
    x = ops.jagged_index_select(x, torch.arange(y.num_segments, device=y.device))
    x = ops.jagged_dense_elementwise_mul(x, dense)
    scores = ops.jagged_jagged_bmm_jagged_out(x, y)
    scores = ops.jagged2_softmax(scores, x.offsets, y.offsets)
    out = ops.array_jagged_bmm(scores, y, x.offsets)
    padded = ops.jagged_to_padded_dense(ops.jagged_dense_bmm(out, weight), LONG)
    longest = ops.jagged_to_padded_dense(out)
    return ops.segment_max(ops.dense_to_jagged(padded, out.offsets)).sum() + padded.sum() + longest.sum()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_ops_in_a_row_are_one_graph(backend: str) -> None:
    given = []
    for seed, lengths in enumerate(BATCHES):
        generator = torch.Generator().manual_seed(seed)
        s = len(lengths)
        x, y = (
            Jagged.from_lengths(torch.randn(sum(n), 3, generator=generator, dtype=torch.float64).requires_grad_(), n)
            for n in (lengths, others(lengths))
        )
        dense = torch.randn(s, LONG, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(s, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        for t in (dense, weight):
            mark_varying(t, 0)
        given.append((x, y, dense, weight))

    def check(index: int, out: Tensor) -> None:
        x, y, dense, weight = given[index]
        leaves = (x.values, y.values, dense, weight)
        want = pipeline(*given[index])
        terms = NUM_OPS * LONG * len(BATCHES[index]) * 3  # the longest sum is over a padded batch
        for got, wanted in zip(
            [out, *(x.grad for x in leaves)], [want, *torch.autograd.grad(want, leaves)], strict=True
        ):
            limit = terms * EPS * max(1.0, float(wanted.detach().abs().max()))
            torch.testing.assert_close(got, wanted, rtol=0, atol=limit)

    assert_compiles(pipeline, given, backend=backend, after_each=check)
