"""The operators of the backend ``cpp``: in graphs, under checkpointing and autocast, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from cases import jagged, make_qkv, needing_gradients
from cpp_cases import F32, F64, STRUCTURES, Shape, batches, numbers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flexjag as fj
from flexjag.backends.cpp import operator
from flexjag.backends.cpp.source import printed
from flexjag.errors import BackendError, LayoutError
from flexjag.kernels.cpp import build
from flexjag.lowering.recipe import Recipe
from flexjag.testing import assert_compiles

pytestmark = pytest.mark.skipif(build.refusal() is not None, reason=str(build.refusal()))
MASK = fj.Causal() & (fj.Window(20, 0) | fj.Prefix(2))
MANY = ([30, 20], [1, 70, 0, 3], [5, 5, 5], [64], [48, 0], [97, 3, 1, 1, 1, 1])
HEADS = 2


class Layer(nn.Module):
    """Attention with a learned bias, by a plan from outside or one made in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(numbers(HEADS, 5).detach())
        self.slopes = nn.Parameter(numbers(HEADS).detach())

    def score(self) -> fj.Score:
        return fj.RelativeBias(self.table) >> fj.SoftCap(5.0) >> fj.Alibi(self.slopes)

    def forward(self, q: fj.Jagged, k: fj.Jagged, v: fj.Jagged, plan: fj.Plan | None = None) -> Tensor:
        plan = fj.plan(q, mask=MASK) if plan is None else plan
        out, lse = fj.attention(q, k, v, plan=plan.with_score(self.score()), backend="cpp", return_lse=True)
        return out.values.square() + lse.values[..., None]


def inputs(lengths: list[int]) -> tuple[fj.Jagged, ...]:
    return needing_gradients(*make_qkv(lengths, heads=HEADS, dim=8, dtype=F32))


@pytest.mark.parametrize("with_plan", [False, True], ids=["plan inside", "plan outside"])
def test_one_graph_for_all_batches(with_plan: bool) -> None:
    """Forward and backward give the bits of eager calls."""
    layer, given = Layer(), []
    for lengths in MANY:
        q, k, v = inputs(lengths)
        k, v = q.with_values(k.values), q.with_values(v.values)
        given.append((q, k, v, fj.plan(q, mask=MASK)) if with_plan else (q, k, v))

    def same(index: int, out: Tensor) -> None:
        leaves = [*(x.values for x in given[index][:3]), *layer.parameters()]
        got = [x.grad for x in leaves]
        for x in leaves:
            x.grad = None
        eager = layer(*given[index])
        assert torch.equal(out, eager)
        for found, wanted in zip(got, torch.autograd.grad(eager.sum(), leaves), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # the graph's own sums are in another order

    graphs = assert_compiles(layer, given, after_each=same, backend="aot_eager")
    assert (len(graphs.forward), len(graphs.backward)) == (1, 1)


@pytest.mark.slow
def test_inductor() -> None:
    layer = Layer()
    for lengths in MANY[:3]:
        q, k, v = inputs(lengths)
        k, v = q.with_values(k.values), q.with_values(v.values)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(q, k, v), layer(q, k, v), rtol=1e-6, atol=1e-6)


def test_export() -> None:
    class Attend(nn.Module):
        def forward(self, x: fj.Jagged) -> Tensor:
            return fj.attention(x, x, x, mask=MASK, backend="cpp").values

    sizes = ([{0: torch.export.Dim("T", max=4096)}, {0: torch.export.Dim("S", max=100)}],)
    program = torch.export.export(Attend(), (jagged([30, 20], 2, 16, dtype=F32),), dynamic_shapes=sizes)
    assert any("cpp_attention" in str(node.target) for node in program.graph.nodes)
    for lengths in ([30, 20], [5, 0, 3, 60]):
        x = jagged(lengths, 2, 16, dtype=F32)
        assert torch.equal(program.module()(x), Attend()(x))


@pytest.mark.parametrize(("learned", "window"), [(False, []), (True, []), (True, [3, 0, 1])])
def test_operators_are_as_they_say(learned: bool, window: list[int]) -> None:
    """``opcheck``: schemas, fakes, the autograd formula, and tracing."""
    q, k, v = inputs([20, 0, 3])
    layer = Layer()
    plan = fj.plan(q, k, mask=MASK, score=layer.score() if learned else None)
    assert isinstance(plan, Recipe)
    text = printed(plan, F32)
    spans = [x for s in plan.sandwiches for x in (s.outer.lo, s.outer.hi, s.inner.lo, s.inner.hi)]
    offsets = [plan.layout.q_offsets, plan.layout.kv_offsets]
    rest = (
        text.numbers,
        text.source,
        offsets,
        [] if window else spans,
        window,
        plan.head_of,
        0.25,
        1.0,
        list(text.unshared),
    )
    values = [x.values for x in (q, k, v)]
    torch.library.opcheck(operator.attend, (*values, text.captures, text.learned, *rest))
    detached, captures = [x.detach() for x in values], [x.detach() for x in text.captures]
    out, lse = operator.attend(*detached, captures, [], *rest)
    given = (torch.ones_like(out), torch.ones_like(lse), *detached, out, lse, captures, text.learned, *rest)
    torch.library.opcheck(operator.differentiate, given, test_utils=("test_schema", "test_faketensor"))


def test_checkpointing() -> None:
    results = []
    for again in (False, True):
        layer, (q, k, v) = Layer(), inputs([30, 20])
        k, v = q.with_values(k.values), q.with_values(v.values)
        out = checkpoint(layer, q, k, v, use_reentrant=False) if again else layer(q, k, v)
        results.append(torch.autograd.grad(out.sum(), [q.values, k.values, v.values, *layer.parameters()]))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


def test_autocast_changes_nothing() -> None:
    results = []
    for enabled in (False, True):
        layer, (q, k, v) = Layer(), inputs([30, 20])
        k, v = q.with_values(k.values), q.with_values(v.values)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = layer(q, k, v)
        results.append((out, *torch.autograd.grad(out.sum(), [q.values, k.values, v.values, *layer.parameters()])))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("what", ["q", "v", "out", "table"])
def test_what_is_written_to_before_the_backward_is_an_error(what: str) -> None:
    """As autograd's own."""
    (q, k, v), table = inputs([9, 4]), numbers(HEADS, 5)
    held = {"q": q.values * 1, "v": v.values * 1, "table": table * 1}
    q, v = q.with_values(held["q"]), v.with_values(held["v"])
    out = fj.attention(q, k, v, score=fj.RelativeBias(held["table"]), backend="cpp").values
    loss = out.sum()
    with torch.no_grad():
        (out if what == "out" else held[what]).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_order_is_an_error() -> None:
    q, k, v = inputs([9, 4])
    out = fj.attention(q, k, v, mask=fj.Causal(), backend="cpp").values
    (first,) = torch.autograd.grad(out.pow(2).sum(), q.values, create_graph=True)
    with pytest.raises(RuntimeError, match="cpp"):
        torch.autograd.grad(first.sum(), q.values)


@pytest.mark.parametrize("what", ["grad", "vmap", "jvp"])
def test_transforms_are_refused_with_the_reason(what: str) -> None:
    x = jagged([9, 4], 2, 8, dtype=F32)

    def loss(values: Tensor) -> Tensor:
        y = x.with_values(values)
        return fj.attention(y, y, y, backend="cpp").values.sum()

    transform = {
        "grad": lambda: torch.func.grad(loss)(x.values),
        "vmap": lambda: torch.vmap(loss)(torch.stack([x.values, x.values])),
        "jvp": lambda: torch.func.jvp(loss, (x.values,), (x.values,)),
    }[what]
    with pytest.raises(BackendError, match=r"torch.func transforms and forward-mode AD know plain torch operations"):
        transform()


def _unknown(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.special.bessel_j0(s)


def test_functions_that_cannot_be_printed_are_refused_with_the_reason() -> None:
    """And ``auto`` runs them elsewhere."""
    x, score = jagged([9, 4], 2, 8, dtype=F32), fj.ScoreMod(_unknown)
    with pytest.raises(BackendError, match=r"'cpp' cannot run this plan: .*bessel_j0"):
        fj.attention(x, x, x, score=score, backend="cpp")
    assert fj.attention(x, x, x, score=score).values.isfinite().all()


@pytest.mark.parametrize("offsets", [[0, 9, 4, 13], [0, 5, 99, 13], [-3, 5, 9, 13], [0, 5, 9, 99], [1, 0, 0, 13]])
@pytest.mark.parametrize("side", ["q", "kv"])
def test_offsets_that_were_written_to_are_an_error_and_read_nothing(offsets: list[int], side: str) -> None:
    """The plan's copies; what a caller holds cannot change a plan."""
    q, k, v = batches(Shape((4, 5, 4), (4, 5, 4), 2, 2), F32, 16, 16)
    plan = fj.plan(q, k, mask=fj.Causal())
    assert isinstance(plan, Recipe)
    text = printed(plan, F32)
    spans = [x for s in plan.sandwiches for x in (s.outer.lo, s.outer.hi, s.inner.lo, s.inner.hi)]
    good, bad = plan.layout.q_offsets, torch.tensor(offsets, dtype=torch.int32)
    given = [bad, good] if side == "q" else [good, bad]
    values = [x.values for x in (q, k, v)]
    rule = "offsets: offsets must rise from at least 0 to at most the number of rows"
    for allowed in ((spans, []), ([], [5, 0, 0])):
        rest = (*allowed, None, 0.25, 1.0, [])
        with pytest.raises(LayoutError, match=rule):
            operator.attend(*values, text.captures, [], text.numbers, text.source, given, *rest)


def test_no_gradient_flows_where_none_is_asked() -> None:
    structure = STRUCTURES["float64"]
    q, k, v = batches(Shape((9, 4), (9, 4)), F64, structure.dim, structure.value_dim)
    leaf = v.values.requires_grad_()
    out = fj.attention(q, k, v, backend="cpp").values
    assert torch.autograd.grad(out.sum(), leaf)[0].shape == leaf.shape
    with torch.no_grad():
        assert not fj.attention(q, k, v, backend="cpp").values.requires_grad
