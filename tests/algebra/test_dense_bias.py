"""Biases given for each pair, packed or shared: against a loop over segments, in graphs, isolated, bad input."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import CPP_SLOWLY, EDGE_LENGTHS, make_qkv
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flexjag as fj
from flexjag.algebra.tree import head_counts
from flexjag.backends.cpp.source import printed
from flexjag.lowering.recipe import Recipe
from flexjag.testing import assert_compiles, assert_matches_reference, assert_no_leak

F64 = torch.float64
BACKENDS = ["reference", "tiled", "segments", "cpp"]
NORMALIZERS = [fj.Softmax(), fj.SiLU(), fj.StickBreaking()]


@dataclass(frozen=True)
class Case:
    """A batch, and the shape of a bias for it."""

    q_lengths: list[int]
    kv_lengths: list[int] | None = None
    heads: int = 2
    groups: int = 1
    packed: bool = True
    per_head: bool = True
    dim: int = 4
    dtype: torch.dtype = F64

    @property
    def keys(self) -> list[int]:
        return self.q_lengths if self.kv_lengths is None else self.kv_lengths

    def batches(self) -> tuple[fj.Jagged, fj.Jagged, fj.Jagged]:
        sizes = {"heads": self.heads, "groups": self.groups, "dim": self.dim, "value_dim": self.dim + 1}
        return make_qkv(self.q_lengths, self.kv_lengths, **sizes, dtype=self.dtype)

    def values(self, dtype: torch.dtype = F64, more: int = 0) -> Tensor:
        pairs = sum(n * m for n, m in zip(self.q_lengths, self.keys, strict=True))
        shape = [pairs + more] if self.packed else [max(x, default=0) + more for x in (self.q_lengths, self.keys)]
        g = torch.Generator().manual_seed(pairs)
        made = torch.randn(self.heads if self.per_head else 1, *shape, generator=g, dtype=F64)
        return made.to(dtype).requires_grad_()

    def matrices(self, values: Tensor) -> list[Tensor]:
        """Each segment's bias ``[H or 1, n, m]``."""
        found, at = [], 0
        for n, m in zip(self.q_lengths, self.keys, strict=True):
            found.append(values[:, at : at + n * m].unflatten(1, (n, m)) if self.packed else values[:, :n, :m])
            at += n * m
        return found


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = st.lists(st.integers(0, 20), min_size=1, max_size=4)
    q_lengths = draw(lengths)
    kv_lengths = [draw(st.integers(0, 20)) for _ in q_lengths] if draw(st.booleans()) else None
    groups = draw(st.sampled_from([1, 2]))
    heads = groups * draw(st.sampled_from([1, 2]))
    return Case(q_lengths, kv_lengths, heads, groups, draw(st.booleans()), draw(st.booleans()))


def by_hand(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged, biases: list[Tensor], before: int) -> Tensor:
    """Softmax attention of the last `before` keys and all later ones, segment by segment."""
    outs = []
    for x, y, z, bias in zip(q.to_list(), k.to_list(), v.to_list(), biases, strict=True):
        repeats = x.shape[1] // y.shape[1]
        y, z = (t.repeat_interleave(repeats, 1).transpose(0, 1) for t in (y, z))
        s = x.transpose(0, 1) @ y.transpose(1, 2) / x.shape[2] ** 0.5 + bias
        i, j = torch.arange(x.shape[0])[:, None], torch.arange(y.shape[1])
        allowed = i - before <= j
        s = s.masked_fill(~allowed, -torch.inf).masked_fill(~allowed.any(1, keepdim=True), 0.0)
        p = s.softmax(-1).masked_fill(~allowed, 0.0)
        outs.append((p @ z).transpose(0, 1))
    return torch.cat(outs)


def outcome(attend: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    out = attend()
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view(out.shape)
    grads = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
    return [out.detach(), *grads]


def equals_the_loop(case: Case, backend: str) -> None:
    batches, values = case.batches(), case.values()
    leaves = [x.values.requires_grad_() for x in batches]
    q, k, v = (x.with_values(t) for x, t in zip(batches, leaves, strict=True))
    plan = fj.plan(q, k, mask=fj.Window(3, None), score=fj.DenseBias(values), block_size=16)
    got = outcome(lambda: fj.attention(q, k, v, plan=plan, backend=backend).values, *leaves, values)
    wanted = outcome(lambda: by_hand(q, k, v, case.matrices(values), 3), *leaves, values)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_equals_a_loop_over_segments(case: Case, backend: str) -> None:
    equals_the_loop(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "shared"])
def test_every_edge_length(packed: bool, backend: str) -> None:
    for lengths in EDGE_LENGTHS.values():
        if lengths:
            equals_the_loop(Case(lengths, packed=packed), backend)
    equals_the_loop(Case([5, 0, 20], [0, 4, 9], heads=4, groups=2, packed=packed), backend)


@pytest.mark.parametrize("backend", ["tiled", "segments", CPP_SLOWLY])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "shared"])
@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=repr)
def test_precisions_and_normalizers(
    normalizer: fj.extend.Normalizer, packed: bool, dtype: torch.dtype, backend: str
) -> None:
    """A bias in the precision of q, and one in float32."""
    for wide in {dtype, torch.float32}:
        case = Case([9, 0, 21, 1], groups=2, packed=packed, dtype=dtype, dim=8)
        q, k, v = case.batches()
        score = fj.DenseBias(case.values(wide)) >> fj.DenseBias(case.values(wide))
        plan = fj.plan(q, k, mask=fj.Causal(), score=score, normalizer=normalizer, block_size=16)
        assert_matches_reference(q, k, v, plan=plan, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "shared"])
def test_flex(packed: bool) -> None:
    case = Case([9, 0, 21, 1], [7, 4, 9, 0], packed=packed, dtype=torch.float32, dim=16)
    q, k, v = case.batches()
    score = fj.DenseBias(case.values(torch.float32).detach())
    plan = fj.plan(q, k, score=score, block_size=16)
    assert_matches_reference(q, k, v, plan=plan, backend="flex", backward=False, lse=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "shared"])
def test_spare_rows(packed: bool, backend: str) -> None:
    """What they hold and what flows back into them matters to nothing; a packed bias may be longer, too."""
    case = Case([5, 0, 20], packed=packed)
    q, k, v = case.batches()
    values, longer = case.values(), case.values(more=7)
    with torch.no_grad():
        longer[..., : values.shape[1], : values.shape[-1]] = values
        longer[:, values.shape[1] :] = torch.nan if packed else 0.0

    def grads(bias: Tensor, spare: int) -> list[Tensor]:
        filler = 0.5 if backend == "tiled" else torch.nan  # which adds 0 times what spare rows hold
        pads = [x.values.new_full((spare, *x.values.shape[1:]), filler) for x in (q, k, v)]
        leaves = [torch.cat([x.values, y]).requires_grad_() for x, y in zip((q, k, v), pads, strict=True)]
        x, y, z = (fj.Jagged(t, q.offsets) for t in leaves)
        plan = fj.plan(x, mask=fj.Causal(), score=fj.DenseBias(bias), max_tokens=25 + spare, block_size=16)

        def attend() -> Tensor:
            return fj.attention(x, y, z, plan=plan, backend=backend).values[:25]

        return [t[:25] for t in outcome(attend, *leaves)] + [outcome(attend, bias)[1]]

    got, wanted = grads(longer, 9), grads(values, 0)
    extra = got[-1].clone()
    extra[..., : values.shape[1], : values.shape[-1]] = 0
    assert not extra.any()
    got[-1] = got[-1][..., : values.shape[1], : values.shape[-1]]
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_are_isolated(backend: str) -> None:
    """In the output and in the bias' gradient, bit by bit, whatever another segment and its bias hold."""
    case = Case([7, 0, 18, 3], groups=2)
    q, k, v = case.batches()
    values = case.values()
    assert_no_leak(backend, q, k, v, mask=fj.Causal(), score=fj.DenseBias(values))
    other = values.detach().clone()
    other[:, 49 : 49 + 18 * 18] *= -30.0
    found = []
    for bias in (values, other.requires_grad_()):
        out = fj.attention(q, k, v, score=fj.DenseBias(bias), backend=backend).values
        (grad,) = torch.autograd.grad(out.square().sum(), bias)
        found.append((torch.cat([out[:7], out[25:]]), torch.cat([grad[:, :49], grad[:, 49 + 18 * 18 :]], 1)))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


def test_threads_add_to_a_packed_gradient_without_copies_and_to_the_same_bits() -> None:
    case = Case([300, 0, 40, 129], heads=4, groups=2, dtype=torch.float32)
    q, k, v = case.batches()
    values, before = case.values(torch.float32), torch.get_num_threads()
    plan = fj.plan(q, k, mask=fj.Causal(), score=fj.DenseBias(values))
    assert isinstance(plan, Recipe)
    assert set(printed(plan, torch.float32).unshared) == set(printed(plan, torch.float32).learned) != set()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = fj.attention(q, k, v, plan=plan, backend="cpp").values
            found.append(torch.autograd.grad(out.square().sum(), values)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "score",
    [
        lambda values: fj.DenseBias(values[:1]),
        lambda values: fj.DenseBias(values.view(2, 5, 5)),
        lambda values: fj.DenseBias(values) >> fj.ScoreMod(lambda s, b, h, i, j: s * values[0, 0]),
    ],
    ids=["all heads", "shared", "read by a function"],
)
def test_what_threads_cannot_add_to_together(score: Callable[[Tensor], fj.Score]) -> None:
    case = Case([5])
    plan = fj.plan(case.batches()[0], score=score(case.values(torch.float32)))
    assert isinstance(plan, Recipe)
    text = printed(plan, torch.float32)
    assert text.learned
    assert not text.unshared


def attended(x: fj.Jagged, bias: Tensor) -> Tensor:
    return fj.attention(x, x, x, mask=fj.Causal(), score=fj.DenseBias(bias)).values


def of_score(x: fj.Jagged, score: fj.Score) -> Tensor:
    return fj.attention(x, x, x, mask=fj.Causal(), score=score).values


BATCHES = ([9, 0, 23], [40, 3, 5, 8, 0], [17, 50], [2, 2, 2, 60], [3, 2], [4, 1, 1], [30])


@pytest.mark.parametrize("outside", [True, False], ids=["node made outside", "node made inside"])
@pytest.mark.parametrize(
    ("packed", "per_head"), [(True, True), (True, False), (False, True)], ids=["packed", "packed, all heads", "shared"]
)
def test_new_lengths_share_one_graph(packed: bool, per_head: bool, outside: bool) -> None:
    shared = torch.randn(2, 64, 64, dtype=F64).requires_grad_()
    given: list[tuple[Any, ...]] = []
    for lengths in BATCHES:
        case = Case(lengths, per_head=per_head)
        q, _, _ = case.batches()
        bias = case.values() if packed else shared
        if packed and not outside:
            torch._dynamo.maybe_mark_dynamic(bias, 1)  # as for any tensor of a batch that is passed by itself
        given.append((q.with_values(q.values.requires_grad_()), fj.DenseBias(bias) if outside else bias))
    attend = of_score if outside else attended

    def check(index: int, out: Tensor) -> None:
        x, bias = given[index]
        bias = bias.values if outside else bias
        got = [out, x.values.grad, bias.grad]
        x.values.grad = bias.grad = None
        wanted = outcome(lambda: attend(*given[index]), x.values, bias)
        torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=1e-12)
        total = torch.autograd.grad(attend(*given[index]).sum(), (x.values, bias))
        for a, b in zip(got[1:], total, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

    assert_compiles(attend, given, backend="aot_eager", after_each=check)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "shared"])
def test_inductor_makes_one_graph(packed: bool) -> None:
    shared = torch.randn(2, 64, 64).requires_grad_()
    given = []
    for lengths in BATCHES:
        case = Case(lengths, dtype=torch.float32, dim=16)
        q, _, _ = case.batches()
        bias = case.values(torch.float32) if packed else shared
        given.append((q.with_values(q.values.requires_grad_()), fj.DenseBias(bias)))
    assert_compiles(of_score, given)


class Attend(torch.nn.Module):
    """Attention with a bias, to be exported."""

    def forward(self, x: fj.Jagged, bias: Tensor) -> Tensor:
        return of_score(x, fj.DenseBias(bias))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "shared"])
def test_export_with_named_sizes(packed: bool) -> None:
    shared = torch.randn(2, 64, 64)

    def given(lengths: list[int]) -> tuple[fj.Jagged, Tensor]:
        case = Case(lengths, dtype=torch.float32)
        return case.batches()[0], case.values(torch.float32).detach() if packed else shared

    tokens, segments, pairs = (torch.export.Dim(x, max=n) for x, n in (("T", 4096), ("S", 100), ("P", 2**22)))
    sizes = ([{0: tokens}, {0: segments}], {1: pairs} if packed else None)
    program = torch.export.export(Attend(), given([40, 3, 60]), dynamic_shapes=sizes)
    for lengths in ([7, 50, 20, 1], [30]):
        torch.testing.assert_close(program.module()(*given(lengths)), Attend()(*given(lengths)))


def test_sizes_that_a_graph_cannot_know_are_asserted() -> None:
    attend = torch.compile(attended, backend="aot_eager", fullgraph=True)
    x = make_qkv([5, 9])[0]
    for bias, why in (
        (torch.zeros(2, 105), r"sum\(n_s \* m_s\) entries"),
        (torch.zeros(2, 9, 8), "a row for each query"),
    ):
        with pytest.raises(RuntimeError, match=why):
            attend(x, bias)


def test_second_derivatives() -> None:
    q = make_qkv([5, 0, 3])[0]

    def attend(bias: Tensor, values: Tensor) -> Tensor:
        x = q.with_values(values)
        return fj.attention(x, x, x, score=fj.DenseBias(bias) >> fj.SoftCap(3.0), backend="tiled").values

    for shape in ((2, 34), (1, 6, 5)):
        bias = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=F64).sin().view(shape).requires_grad_()
        assert torch.autograd.gradcheck(attend, (bias, q.values.clone().requires_grad_()), fast_mode=True)
        assert torch.autograd.gradgradcheck(attend, (bias, q.values.clone().requires_grad_()), fast_mode=True)


def test_one_plan_for_layers_with_biases_of_their_own() -> None:
    case = Case([9, 0, 21])
    q, k, v = case.batches()
    plan = fj.plan(q, k, mask=fj.Causal())
    for values in (case.values(), case.values() * 2):
        own = plan.with_score(fj.DenseBias(values))
        assert own.layout is plan.layout
        assert_matches_reference(q, k, v, plan=own, backend="tiled")
        copy = pickle.loads(pickle.dumps(own))
        got, wanted = (fj.attention(q, k, v, plan=one).values for one in (copy, own))
        torch.testing.assert_close(got, wanted)


def test_gradients_reach_the_given_tensor_when_a_plan_is_used_again() -> None:
    """A plan made without gradients reads the bias as it is when it is used."""
    case = Case([4, 6])
    q, k, v = case.batches()
    values = case.values()
    with torch.no_grad():
        plan = fj.plan(q, k, score=fj.DenseBias(values))
    for _ in range(2):
        got = outcome(lambda: fj.attention(q, k, v, plan=plan).values, values)
        wanted = outcome(lambda: by_hand(q, k, v, case.matrices(values), 99), values)
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x, y)
        with torch.no_grad():
            values.mul_(0.5)


def test_minus_infinity_rules_pairs_out() -> None:
    case = Case([5, 9], per_head=False)
    q, k, v = case.batches()
    holes = torch.rand(1, 25 + 81, generator=torch.Generator().manual_seed(0)) < 0.4
    values = torch.where(holes, -torch.inf, 0.0).double()
    wanted = fj.attention(q, k, v, mask=fj.Dense(~holes[0])).values
    for backend in ("reference", "tiled", "segments", "cpp"):
        got = fj.attention(q, k, v, score=fj.DenseBias(values), backend=backend).values
        torch.testing.assert_close(got, wanted)


def test_from_list() -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.arange(4.0).view(2, 2)
    assert fj.DenseBias.from_list([a, b]).values.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]
    two = fj.DenseBias.from_list([torch.stack([a, -a]), torch.zeros(2, 0, 7), torch.stack([b, -b])])
    assert two.values.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3], [0, -1, -2, -3, -4, -5, 0, -1, -2, -3]]
    assert head_counts(two) == {2}
    assert head_counts(fj.DenseBias(torch.zeros(1, 7))) == set()
    assert repr(fj.DenseBias(torch.zeros(1, 7))) == "DenseBias(<float32[1, 7]>)"


def test_the_source_of_kernels_is_the_same_for_all_lengths() -> None:
    for packed in (True, False):
        made = [Case(lengths, packed=packed) for lengths in ([1], [1, 0, 1], [5, 20], [0])]
        plans = [fj.plan(x.batches()[0], score=fj.DenseBias(x.values())) for x in made]
        assert len({plan.source("cpp") for plan in plans}) == 1


def test_what_explain_says() -> None:
    q, _, _ = Case([5, 9]).batches()
    text = str(fj.plan(q, score=fj.DenseBias(torch.zeros(2, 106))).explain())
    assert "DenseBias(<float32[2, 106]>)" in text
