"""Pointwise normalizers: by definition, against the reference, alone and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import EDGE_LENGTHS, make_qkv, needing_gradients
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flexjag as fj
from flexjag.algebra.node import node
from flexjag.algebra.normalizers import GELU, Identity, Normalizer, Pointwise, Sigmoid, SiLU
from flexjag.backends.normalized.pointwise import Activation, activation
from flexjag.backends.reference import weigh
from flexjag.errors import PlanError, ShapeError
from flexjag.testing import Problem, assert_compiles, assert_matches_reference, assert_no_leak, problems

CLOSE = {"rtol": 1e-11, "atol": 1e-12}  # float64: a few hundred roundings of numbers of about 1
BACKENDS = pytest.mark.parametrize("backend", ["reference", "tiled", "segments", "cpp"])
FAST = pytest.mark.parametrize("backend", ["tiled", "segments"])
LENGTHS = [40, 7, 0, 33]


def erf_gelu(s: Tensor) -> Tensor:
    return 0.5 * s * (1 + torch.erf(s / math.sqrt(2)))


def tanh_gelu(s: Tensor) -> Tensor:
    return 0.5 * s * (1 + torch.tanh(math.sqrt(2 / math.pi) * (s + 0.044715 * s**3)))


BIAS = torch.tensor([0.3, -1.0], dtype=torch.float64)
KINDS: dict[str, tuple[Normalizer, Callable[[Tensor, int], Tensor]]] = {
    "silu": (SiLU(scale=0.25), lambda s, m: 0.25 * s / (1 + torch.exp(-s))),
    "gelu": (GELU(), lambda s, m: erf_gelu(s)),
    "gelu, tanh": (GELU(0.5, approximate="tanh"), lambda s, m: 0.5 * tanh_gelu(s)),
    "identity": (Identity(0.125), lambda s, m: 0.125 * s),
    "sigmoid": (Sigmoid(), lambda s, m: 1 / (1 + torch.exp(-s) * m)),
    "sigmoid, number": (Sigmoid(-2.0, 3.0), lambda s, m: 3 / (1 + torch.exp(2 - s))),
    "sigmoid, heads": (Sigmoid(BIAS), lambda s, m: 1 / (1 + torch.exp(-s - BIAS[:, None, None]))),
}
ALL = pytest.mark.parametrize("kind", KINDS)
MASKS: dict[str, tuple[fj.Mask, Callable[[Tensor, Tensor], Tensor]]] = {
    "full": (fj.Full(), lambda i, j: (i >= 0) & (j >= 0)),
    "causal": (fj.Causal(), lambda i, j: j <= i),
    "sinks": (fj.Causal() & (fj.Window(3, 0) | fj.Prefix(2)), lambda i, j: (j <= i) & ((i - 3 <= j) | (j < 2))),
    "some rows": (fj.MaskMod(lambda b, h, q, kv: (q % 3 != 0) & (kv <= q)), lambda i, j: (i % 3 != 0) & (j <= i)),
    "no key": (~fj.Full(), lambda i, j: (i < 0) & (j < 0)),
}


def by_hand(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged, weight, allowed, scale: float) -> Tensor:  # type: ignore[no-untyped-def]
    """A loop over segments: weights of every allowed key, times its value. No code of flexjag but `to_list`."""
    link = 0 * (q.values.sum() + k.values.sum() + v.values.sum())  # gradients exist even if there is no segment
    outs = [q.values.new_zeros(0, q.values.shape[1], v.values.shape[2]) + link]
    for x, y, z in zip(q.to_list(), k.to_list(), v.to_list(), strict=True):
        y, z = (t.repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (y, z))
        scores = scale * torch.einsum("nhd,mhd->hnm", x, y)
        ok = allowed(torch.arange(x.shape[0])[:, None], torch.arange(y.shape[0])[None])
        outs.append(torch.einsum("hnm,mhe->nhe", weight(scores, y.shape[0]) * ok, z))
    return torch.cat(outs)


def gradients(out: Tensor, *leaves: fj.Jagged) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return list(torch.autograd.grad((out * weights).sum(), [x.values for x in leaves], materialize_grads=True))


def check(normalizer: Normalizer, weight, mask: str, batches, backend: str, block: int = 16) -> None:  # type: ignore[no-untyped-def]
    node, allowed = MASKS[mask]
    q, k, v = needing_gradients(*batches)
    plan = fj.plan(batches[0], batches[1], mask=node, normalizer=normalizer, block_size=block)
    out = fj.attention(
        q, batches[1].with_values(k.values), batches[2].with_values(v.values), plan=plan, backend=backend
    )
    expected = by_hand(q, k, v, weight, allowed, q.values.shape[2] ** -0.5)
    pairs = zip([out.values, *gradients(out.values, q, k, v)], [expected, *gradients(expected, q, k, v)], strict=True)
    for name, (got, wanted) in zip(("out", "dq", "dk", "dv"), pairs, strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@BACKENDS
@ALL
@pytest.mark.parametrize("mask", MASKS)
def test_definition(kind: str, mask: str, backend: str) -> None:
    check(*KINDS[kind], mask, make_qkv(LENGTHS), backend)


@BACKENDS
@pytest.mark.parametrize("lengths", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS.keys())
@pytest.mark.parametrize("kind", ["silu", "sigmoid"])
def test_every_edge_length(kind: str, lengths: list[int], backend: str) -> None:
    for mask in ("full", "causal", "some rows"):
        check(*KINDS[kind], mask, make_qkv(lengths), backend)


@BACKENDS
@pytest.mark.parametrize(("groups", "dim", "value_dim"), [(1, 16, 16), (2, 16, 24), (4, 8, 3), (4, 1, 1)])
def test_shapes(groups: int, dim: int, value_dim: int, backend: str) -> None:
    batches = make_qkv(LENGTHS, heads=4, groups=groups, dim=dim, value_dim=value_dim)
    for mask in ("causal", "sinks"):
        check(*KINDS["silu"], mask, batches, backend)


@BACKENDS
@pytest.mark.parametrize("kv_lengths", [[50, 20, 3, 1], [3, 0, 5, 40], [0, 0, 0, 0]], ids=str)
def test_cross_attention(kv_lengths: list[int], backend: str) -> None:
    for kind in ("silu", "sigmoid"):
        for mask in ("full", "causal"):
            check(*KINDS[kind], mask, make_qkv(LENGTHS, kv_lengths, heads=4, groups=2), backend)


@FAST
@pytest.mark.parametrize("kind", ["silu", "sigmoid, heads"])
def test_many_pieces(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces as small as they get: 16 rows, or one row of tiles."""
    from flexjag.backends import blocks
    from flexjag.backends.normalized import pieces

    monkeypatch.setattr(blocks, "CHUNK_SCORES", 1)
    monkeypatch.setattr(pieces, "RUN_SCORES", 1)
    for mask in MASKS:
        check(*KINDS[kind], mask, make_qkv(LENGTHS), backend)


@FAST
@ALL
def test_gradcheck(kind: str, backend: str) -> None:
    """Numerical differentiation shares no code with any backend. Rows 0 and 1 of segment 1 have no key."""
    q, k, v = make_qkv([3, 4], [2, 2], heads=2, groups=1, dim=3, value_dim=2)
    slopes, bias = (torch.tensor(x, dtype=torch.float64) for x in ([0.3, -0.2], [0.1, -0.7]))
    factors = torch.linspace(0.5, 2, 7, dtype=torch.float64)

    def run(x, y, z, slopes, bias, factors):  # type: ignore[no-untyped-def]
        normalizer = Sigmoid(bias, factors) if kind == "sigmoid, heads" else KINDS[kind][0]
        normalizer = SiLU(factors) if kind == "silu" else normalizer
        values = (b.with_values(t) for b, t in ((q, x), (k, y), (k, z)))
        score = fj.Alibi(slopes) >> fj.SoftCap(2.0)
        return fj.attention(*values, mask=fj.Causal("end"), score=score, normalizer=normalizer, backend=backend).values

    leaves = [x.detach().clone().requires_grad_() for x in (q.values, k.values, v.values, slopes, bias, factors)]
    assert torch.autograd.gradcheck(run, leaves)


@BACKENDS
def test_scale_per_token(backend: str) -> None:
    """HSTU divides each row by a length of its own; a 0-d tensor scales all of them."""
    q, k, v = make_qkv(LENGTHS)
    factors = torch.linspace(0.1, 2.0, sum(LENGTHS), dtype=torch.float64)
    plain = fj.attention(q, k, v, normalizer=SiLU(), backend=backend).values
    for scale, wanted in ((factors, plain * factors[:, None, None]), (factors[3], plain * factors[3])):
        got = fj.attention(q, k, v, normalizer=SiLU(scale), backend=backend).values
        torch.testing.assert_close(got, wanted, **CLOSE)


@given(data=st.data())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@FAST
def test_backends_are_the_reference(backend: str, dtype: torch.dtype, data: st.DataObject) -> None:
    p = data.draw(problems(dtype=dtype))
    normalizer = data.draw(normalizers(p))
    plan = fj.plan(p.q, p.k, mask=p.mask, score=p.score, normalizer=normalizer, block_size=p.block_size)
    assert_matches_reference(p.q, p.k, p.v, plan=plan, backend=backend, learned=p.learned)


@given(data=st.data())
@FAST
def test_no_segment_leaks(backend: str, data: st.DataObject) -> None:
    p = data.draw(problems(dtype=torch.float32))
    plan = fj.plan(p.q, p.k, mask=p.mask, score=p.score, normalizer=data.draw(normalizers(p)), block_size=p.block_size)
    assert_no_leak(backend, p.q, p.k, p.v, plan=plan, return_lse=False)


@given(data=st.data())
def test_a_jagged_batch_is_a_loop_over_its_segments(data: st.DataObject) -> None:
    p = data.draw(problems(portable=True, depth=3))
    normalizer = data.draw(st.sampled_from([SiLU(0.5), GELU(), Sigmoid(), Identity(0.1)]))
    whole = fj.attention(p.q, p.k, p.v, mask=p.mask, score=p.score, normalizer=normalizer, backend="tiled")
    for one, *qkv in zip(*(x.to_list() for x in (whole, p.q, p.k, p.v)), strict=True):
        q, k, v = (fj.Jagged.from_list([x]) for x in qkv)
        wanted = fj.attention(q, k, v, mask=p.mask, score=p.score, normalizer=normalizer, backend="reference")
        torch.testing.assert_close(one, wanted.values, rtol=1e-10, atol=1e-10)  # Identity after a long chain: 1e2


@st.composite
def normalizers(draw: st.DrawFn, p: Problem) -> Normalizer:
    """Any pointwise normalizer for a problem."""
    scale = draw(st.sampled_from([1.0, 0.25, -2.0, "rows"]))
    if scale == "rows":
        scale = torch.linspace(0.5, 2, p.q.values.shape[0])
    kind = draw(st.sampled_from([SiLU, GELU, Identity, Sigmoid]))
    if kind is Sigmoid:
        bias = draw(st.sampled_from([None, -3.0, torch.linspace(-2, 1, p.heads)]))
        return Sigmoid(bias, scale)
    return kind(scale)


@BACKENDS
def test_fixed_capacity_zeroes_the_spare_rows(backend: str) -> None:
    lengths, tokens, used = [30, 0, 17, 1], 64, 48
    exact = make_qkv(lengths)
    q, k, v = (
        fj.Jagged(torch.cat([x.values, x.values.new_full((16, *x.values.shape[1:]), 1e4)]), exact[0].offsets)
        for x in exact
    )
    q, k, v = needing_gradients(q, k, v)
    for normalizer in (SiLU(), Sigmoid(0.0)):
        plan = fj.plan(q, mask=fj.Causal(), normalizer=normalizer, max_tokens=tokens, max_length=30)
        out = fj.attention(q, k, v, plan=plan, backend=backend).values
        expected = fj.attention(*exact, mask=fj.Causal(), normalizer=normalizer, backend="reference").values
        assert not out[used:].any()
        torch.testing.assert_close(out[:used], expected, **CLOSE)
        for grad in torch.autograd.grad((out**2).sum(), [q.values, k.values, v.values]):
            assert grad[:used].any()
            assert not grad[used:].any()


POISON = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])


@POISON
@pytest.mark.parametrize("which", [1, 2], ids=["k", "v"])
@pytest.mark.parametrize("backend", ["reference", "segments", "cpp"])
def test_poison_stays_in_its_segment(which: int, value: float, backend: str) -> None:
    batches = needing_gradients(*make_qkv([3, 5, 8, 0, 11]))
    others = torch.ones(27, dtype=torch.bool)
    others[3:8] = False
    found = []
    for poison in (False, True):
        q, k, v = batches
        bad = [k, v][which - 1]
        values = bad.values.masked_fill(~others[:, None, None], value) if poison else bad.values
        k, v = (q.with_values(values if x is bad else x.values) for x in (k, v))
        out = fj.attention(q, k, v, mask=fj.Causal(), normalizer=SiLU(), backend=backend).values
        found.append([out, *torch.autograd.grad(out[others].sum(), [x.values for x in batches])])
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean[others], dirty[others])


@pytest.mark.parametrize("backend", ["tiled", "segments"])
def test_gradients_are_the_same_every_time(backend: str) -> None:
    """On two threads, where plain indexing adds with atomics."""
    threads = torch.get_num_threads()
    q, k, v = needing_gradients(*make_qkv([300, 200, 7], heads=2, dtype=torch.float32))
    table = torch.randn(2, 9, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        out = fj.attention(q, k, v, mask=fj.Causal(), score=fj.RelativeBias(table), normalizer=SiLU(), backend=backend)
        return torch.autograd.grad((out.values**2).sum(), [q.values, k.values, v.values, table])

    torch.set_num_threads(2)
    try:
        first = run()
        assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_one_graph_for_all_batches() -> None:
    """Forward and backward, with a scale per token and a learned table; values as in eager mode."""
    table = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    g = torch.Generator().manual_seed(1)

    def attend(x: fj.Jagged, scale: Tensor) -> Tensor:
        first = fj.attention(x, x, x, mask=fj.Causal(), score=fj.RelativeBias(table), normalizer=SiLU(scale))
        second = fj.attention(first, x, x, mask=fj.Window(9, 2), score=fj.Alibi(bias), normalizer=Sigmoid(bias))
        return fj.attention(second, x, x, normalizer=GELU()).values + fj.attention(x, x, x, normalizer=Sigmoid()).values

    given = []
    for index in range(12):
        lengths = torch.randint(0, 60, (2 + index % 5,), generator=g).tolist() if index else [40, 33]
        values = torch.randn(sum(lengths), 2, 8, generator=g, dtype=torch.float64).requires_grad_()
        scale = torch.rand(sum(lengths), generator=g, dtype=torch.float64)
        torch._dynamo.maybe_mark_dynamic(scale, 0)
        given.append((fj.Jagged.from_lengths(values, lengths), scale))

    def same(index: int, out: Tensor) -> None:
        x, scale = given[index]
        eager = attend(x, scale)
        torch.testing.assert_close(out, eager, **CLOSE)
        leaves = [x.values, table, bias]
        found = [leaf.grad for leaf in leaves]
        for got, wanted in zip(found, torch.autograd.grad(eager.sum(), leaves), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)  # sums over 3 layers of up to 240 tokens
        for leaf in leaves:
            leaf.grad = None

    graphs = assert_compiles(attend, given, after_each=same)
    assert graphs.forward == graphs.backward == [0]


@node
class Cube(Pointwise):
    """A user's normalizer, without a backward of its own."""

    scale: float = 1.0


@activation.register(Cube)
def _(normalizer: Cube) -> Activation:
    return Activation(lambda s: s**3)


@weigh.register(Cube)
def _(normalizer: Cube, x: Tensor, allowed: Tensor, seg: object) -> tuple[Tensor, Tensor]:
    return (x**3).masked_fill(~allowed, 0.0), x.new_zeros(x.shape[:2])


@BACKENDS
def test_a_normalizer_of_ones_own(backend: str) -> None:
    check(Cube(), lambda s, m: s**3, "sinks", make_qkv(LENGTHS), backend)


@FAST
def test_a_score_may_ignore_the_product(backend: str) -> None:
    q, k, v = needing_gradients(*make_qkv([9]))
    score = fj.ScoreMod(lambda s, b, h, q, kv: (q - kv).to(s.dtype))
    out = fj.attention(q, k, v, score=score, normalizer=SiLU(), backend=backend).values
    wanted = fj.attention(q, k, v, score=score, normalizer=SiLU(), backend="reference").values
    for got, expected in zip(gradients(out, q, k, v), gradients(wanted, q, k, v), strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


def test_auto_takes_a_backend_that_can() -> None:
    x = fj.Jagged.from_lengths(torch.randn(90, 2, 16), [40, 50])
    plan = fj.plan(x, mask=fj.Causal() & fj.Prefix(30), score=fj.SoftCap(3.0), normalizer=SiLU())
    assert plan.backend in ("segments", "tiled", "cpp")  # by their costs
    assert "its kernels compute a softmax, not SiLU(1.0)" in plan.explain()
    short = fj.Jagged.from_lengths(torch.randn(400, 2, 16), [2] * 200)  # where each segment would cost a call
    assert fj.plan(short, normalizer=SiLU()).backend in ("tiled", "cpp")


def test_what_cannot_be_raises() -> None:
    q, k, v = make_qkv([5])
    with pytest.raises(PlanError, match=r"return_lse: only a softmax has a log-sum-exp; got normalizer=SiLU\(1.0\)"):
        fj.attention(q, k, v, normalizer=SiLU(), return_lse=True)
    with pytest.raises(PlanError, match=r"return_remainder: only stick-breaking leaves a remainder; .*Softmax\(\)"):
        fj.attention(q, k, v, return_remainder=True)
    with pytest.raises(PlanError, match=r"scale: must have one entry per query token; got entries=4, tokens=5"):
        fj.attention(q, k, v, normalizer=SiLU(torch.ones(4)))
    with pytest.raises(ShapeError, match=r"must be made for q's heads; got made_for=3, heads=2"):
        fj.attention(q, k, v, normalizer=Sigmoid(torch.zeros(3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SiLU(math.nan), r"scale: must be a finite number or a tensor; got value=nan"),
        (lambda: SiLU("1"), r"scale: must be a finite number or a tensor; got value='1'"),  # type: ignore[arg-type]
        (lambda: Identity(torch.ones(2, 2)), r"scale: must be floating point, 0-d or \[T_q\]; got shape=\(2, 2\)"),
        (lambda: GELU(torch.ones(2, dtype=torch.int64)), r"scale: must be floating point.*dtype=torch.int64"),
        (lambda: GELU(approximate="erf"), r"approximate: must be 'none' or 'tanh'; got approximate='erf'"),  # type: ignore[arg-type]
        (lambda: Sigmoid(torch.tensor(0.0)), r"bias: must be floating point, \[H\]; got shape=\(\)"),
        (lambda: Sigmoid(math.inf), r"bias: must be a finite number or a tensor; got value=inf"),
    ],
)
def test_malformed_normalizers_raise(make: Callable[[], Normalizer], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


def test_equality() -> None:
    assert SiLU(0.5) == SiLU(0.5) != SiLU(0.25)
    assert GELU() != Identity()
    assert Sigmoid(BIAS) == Sigmoid(BIAS)
    assert len({SiLU(), SiLU(1.0), Sigmoid()}) == 2
