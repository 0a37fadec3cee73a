"""The Triton kernels of stick-breaking attention: in Triton's interpreter against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import triton.language as tl
from cases import CUDA_ONLY, EDGE_LENGTHS, make_qkv, mostly_slow, needing_gradients, on_gpu
from torch import Tensor

import flexjag as fj
from flexjag.algebra.normalizers import StickBreaking
from flexjag.backends.triton.stick_breaking_kernels import softplus
from flexjag.codegen.worker import Worker
from flexjag.kernels.math import jit
from flexjag.testing import assert_compiles, assert_no_leak
from flexjag.testing.oracle import Result, Trial, check_against_reference

HERE = __name__
LENGTHS = [40, 7, 0, 33]
HOLES = fj.MaskMod(lambda b, h, q, kv: (q + kv + h) % 3 != 0)
BOTH, OWN, REST, NEITHER = StickBreaking(True, True), StickBreaking(True), StickBreaking(False, True), StickBreaking()


@dataclass(frozen=True)
class Case:
    """One problem; tensors are made where it is run."""

    mask: Callable[[], fj.Mask] = fj.Causal
    normalizer: StickBreaking = NEITHER
    lengths: tuple[int, ...] = tuple(LENGTHS)
    kv_lengths: tuple[int, ...] | None = None
    score: Callable[[], fj.Score] | None = None
    heads: int = 2
    groups: int = 1
    dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    block: int = 16
    scale: float | None = None

    def batches(self) -> tuple[fj.Jagged, fj.Jagged, fj.Jagged]:
        kv_lengths = None if self.kv_lengths is None else list(self.kv_lengths)
        sizes = {"heads": self.heads, "groups": self.groups, "dim": self.dim, "value_dim": self.value_dim}
        return make_qkv(list(self.lengths), kv_lengths, **sizes, dtype=self.dtype)  # type: ignore[arg-type]

    def plan(self, q: fj.Jagged, k: fj.Jagged) -> fj.Plan:
        with torch.device(q.values.device):
            mask, score = self.mask(), None if self.score is None else self.score()
        return fj.plan(q, k, mask=mask, score=score, normalizer=self.normalizer, block_size=self.block)


def same_group() -> fj.Mask:
    return fj.Causal() & fj.SameGroup(torch.arange(80) // 5 % 3)


def slopes_and_cap() -> fj.Score:
    return fj.Alibi(torch.tensor([0.3, -0.2], requires_grad=True)) >> fj.SoftCap(2.0)


def table() -> fj.Score:
    return fj.RelativeBias(torch.linspace(-1, 1, 18).view(2, 9).sin().requires_grad_())


LONGER, SHORTER = (50, 20, 3, 1), (3, 0, 5, 40)
CASES: dict[str, Case] = {
    "causal": Case(),
    "causal, own key": Case(normalizer=OWN, groups=2),
    "causal, remainder": Case(normalizer=REST),
    "causal, both": Case(normalizer=BOTH),
    "window": Case(lambda: fj.Causal() & fj.Window(5, 0), OWN),
    "sinks": Case(lambda: fj.Causal() & (fj.Window(3, 0) | fj.Prefix(2))),
    "groups": Case(same_group, OWN),
    "holes": Case(lambda: fj.Causal() & HOLES, BOTH),
    "per head": Case(lambda: fj.PerHead([fj.Causal(), fj.Window(3, 0)])),
    "no key": Case(lambda: fj.Causal() & ~fj.Causal(), REST),
    "longer keys": Case(lambda: fj.Causal("end"), kv_lengths=LONGER),
    "longer keys, own key": Case(lambda: fj.Causal("end"), OWN, kv_lengths=LONGER),
    "shorter keys": Case(kv_lengths=SHORTER),
    "shorter keys, end": Case(lambda: fj.Causal("end"), OWN, kv_lengths=SHORTER),
    "FULL tile with the key to leave out": Case(lambda: fj.Causal("end"), lengths=(16,), kv_lengths=(47,)),
    "odd features": Case(normalizer=REST, heads=4, groups=2, dim=24, value_dim=24),
    "value features": Case(dim=1, value_dim=5, heads=4, groups=2),
    "slopes, cap": Case(score=slopes_and_cap, heads=2, groups=2),
    "table": Case(normalizer=BOTH, score=table),
    "many tiles": Case(lengths=(150, 0, 1, 90), block=32),
    "tiles of many steps": Case(lengths=(90, 60), block=128, heads=1),
    "steep": Case(scale=8.0, normalizer=BOTH),
    "bfloat16": Case(lengths=(70, 33), dtype=torch.bfloat16, block=32, score=slopes_and_cap),
    "bfloat16, both": Case(dtype=torch.bfloat16, normalizer=BOTH),
    "float16": Case(dtype=torch.float16, normalizer=OWN),
}
QUICK = ("causal, both", "groups", "no key", "longer keys, own key", "shorter keys", "slopes, cap", "float16")


@cache
def prepare() -> None:
    """Make this process, a worker, one that can run the kernels."""
    from flexjag.codegen.run.interpreter import mend_interpreter

    torch.set_num_threads(1)
    mend_interpreter()


def attend(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged, **keywords: Any) -> tuple[Tensor, Tensor]:
    out, rest = fj.attention(q, k, v, return_remainder=True, backend="triton", **keywords)  # type: ignore[misc]
    return out.values, rest.values


def compare(case: Case, *batches: fj.Jagged) -> dict[str, float]:
    """Errors of the output, the remainder and all gradients, as shares of what is allowed."""
    q, k, v = needing_gradients(*(batches or case.batches()))
    if case.kv_lengths is None:
        k, v = q.with_values(k.values), q.with_values(v.values)
    trial = Trial.make(q, k, v, case.plan(q, k), case.scale, None, lse=True, backward=True, seed=0)

    def run(_: Result) -> Result:
        out, rest = attend(q, k, v, plan=trial.plan, scale=trial.scale)
        loss = (out * trial.grad_out).sum() + (rest * trial.grad_lse).sum()
        return Result(out, rest, list(torch.autograd.grad(loss, [q.values, k.values, v.values, *trial.learned])))

    return check_against_reference(trial, run, "triton", case.dtype, norms=True)


def compare_named(name: str) -> dict[str, float]:
    prepare()
    return compare(CASES[name])


def compare_lengths(lengths: list[list[int]]) -> list[dict[str, float]]:
    prepare()
    return [compare(Case(normalizer=REST, lengths=tuple(one))) for one in lengths]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Worker]:
    with Worker(interpret=True) as running:
        yield running


@pytest.mark.parametrize("name", mostly_slow(CASES, *QUICK))
def test_equals_the_reference(name: str, interpreter: Worker) -> None:
    ratios = interpreter.call("call_function", HERE, "compare_named", name)
    assert {"out", "remainder", "grad_q", "grad_k", "grad_v"} <= ratios.keys()
    assert ("grad_learned[0]" in ratios) == (CASES[name].score is not None)
    assert max(ratios.values()) <= 1, ratios


@pytest.mark.parametrize("name", [pytest.param(name, marks=CUDA_ONLY) for name in CASES])
def test_equals_the_reference_on_a_gpu(name: str) -> None:
    ratios = compare(CASES[name], *on_gpu(*CASES[name].batches()))
    assert max(ratios.values()) <= 1, ratios


def test_every_edge_length(interpreter: Worker) -> None:
    lengths = [one for one in EDGE_LENGTHS.values() if sum(one)]
    for ratios in interpreter.call("call_function", HERE, "compare_lengths", lengths):
        assert max(ratios.values()) <= 1, ratios


@jit
def softplus_of(s, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, N)
    tl.store(out + at, softplus(tl.load(s + at)))


def run_softplus(s: Tensor) -> Tensor:
    prepare()
    out = torch.empty_like(s)
    softplus_of[(1,)](s, out, N=s.shape[0])
    return out


def test_softplus_has_small_relative_errors(interpreter: Worker) -> None:
    """Of small numbers, too: a long row sums up many of them."""
    s = torch.cat([torch.linspace(-80, 80, 4093), torch.tensor([0.0, torch.inf, -torch.inf])])
    got = interpreter.call("call_function", HERE, "run_softplus", s).double()
    wanted = torch.logaddexp(s.double(), torch.zeros((), dtype=torch.float64))
    assert torch.equal(got[-2:], wanted[-2:])
    # exp(-|s|) is rounded relative to |s| + 1; then a polynomial (2e-7, from which its coefficients were fitted).
    allowed = wanted[:-2] * (2e-7 + torch.finfo(torch.float32).eps * (1 + torch.exp(-s[:-2].abs()) * s[:-2].abs()))
    assert ((got - wanted)[:-2].abs() <= 2 * allowed).all()


def sums_with_remainder(size: float) -> tuple[Tensor, Tensor, Tensor]:
    prepare()
    q, k, _ = make_qkv([100, 1, 0, 17], dtype=torch.float32)
    ones = q.with_values(torch.ones(118, 2, 1))
    keywords: dict[str, Any] = {"mask": fj.Causal(), "scale": size / 4}
    out, rest = attend(q, k, ones, normalizer=NEITHER, **keywords)
    return out, rest, attend(q, k, ones, normalizer=REST, **keywords)[0]


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_rows_sum_to_one_with_the_remainder(size: float, interpreter: Worker) -> None:
    out, rest, whole = interpreter.call("call_function", HERE, "sums_with_remainder", size)
    assert (rest >= 0).all()
    assert (rest <= 1).all()
    # Every weight is exp of a sum of up to 100 softplus of at most `reach`, each sum rounded that often.
    limit = 100 * torch.finfo(torch.float32).eps * (size * 16 + 100)
    assert (out[..., 0] + rest - 1).abs().max() <= limit
    assert (whole - 1).abs().max() <= limit


def at_extremes(z: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    prepare()
    x = torch.ones(40, 1, 1, requires_grad=True)
    v = torch.arange(40, dtype=torch.float32).view(40, 1, 1).requires_grad_()
    q = fj.Jagged.from_lengths(x, [40])
    out, rest = attend(q, q, q.with_values(v), mask=fj.Causal(), normalizer=NEITHER, scale=z)
    return out.detach(), rest.detach(), list(torch.autograd.grad(out.sum() + rest.sum(), [x, v]))


@pytest.mark.parametrize("z", [50.0, -50.0, 1000.0, -1000.0])
def test_extreme_scores(z: float, interpreter: Worker) -> None:
    """At +z the nearest key takes everything, at -z nobody takes anything; nothing is NaN on the way."""
    out, rest, grads = interpreter.call("call_function", HERE, "at_extremes", z)
    nearest = torch.arange(40.0).sub(1).clamp(min=0)
    error = 4 * abs(z) * torch.finfo(torch.float32).eps * 39 + 40 * 39 * torch.exp(torch.tensor(-abs(z))).item()
    assert (out.flatten() - (nearest if z > 0 else 0)).abs().max() <= error
    assert (rest.flatten()[1:] - float(z < 0)).abs().max() <= error
    assert all(grad.isfinite().all() for grad in grads)


def all_results(case: Case, batches: tuple[fj.Jagged, ...], plan: fj.Plan) -> list[Tensor]:
    """The output, the remainder and all gradients of a loss that weighs both."""
    q, k, v = needing_gradients(*batches)
    k, v = (k, k.with_values(v.values)) if case.kv_lengths else (q.with_values(x.values) for x in (k, v))
    out, rest = attend(q, k, v, plan=plan)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    learned = [plan.score.first.slopes] if plan.score is not None else []  # type: ignore[attr-defined]
    grads = torch.autograd.grad((out * weights).sum() + (rest**2).sum(), [q.values, k.values, v.values, *learned])
    return [out.detach(), rest.detach(), *grads]


def run_in_turns() -> tuple[list[Tensor], list[Tensor]]:
    """The same twice: with notes of all heads at once, and of one group after the other."""
    prepare()
    from flexjag.backends.triton import stick_breaking_launch as launch

    case = Case(normalizer=BOTH, heads=4, groups=2, score=lambda: fj.Alibi(torch.ones(4) / 9) >> fj.SoftCap(2.0))
    batches = case.batches()
    plan = case.plan(*batches[:2])
    plan.score.first.slopes.requires_grad_()  # type: ignore[union-attr]
    at_once = all_results(case, batches, plan)
    launch.NOTES = 1
    try:
        return at_once, all_results(case, batches, plan)
    finally:
        launch.NOTES = 2**28


@pytest.mark.slow
def test_heads_in_turns_and_again_are_bitwise_the_same(interpreter: Worker) -> None:
    at_once, in_turns = interpreter.call("call_function", HERE, "run_in_turns")
    assert len(at_once) == len(in_turns) == 6
    assert all(torch.equal(a, b) for a, b in zip(at_once, in_turns, strict=True))
    assert all(x.any() for x in at_once)


def check_leaks() -> None:
    prepare()
    case = Case(lambda: fj.Causal() & HOLES, BOTH)
    q, k, v = case.batches()
    keywords = {"plan": case.plan(q, k), "return_lse": False, "return_remainder": True}
    assert_no_leak("triton", q, k, v, **keywords)


def test_no_segment_leaks(interpreter: Worker) -> None:
    interpreter.call("call_function", HERE, "check_leaks")


POISONED = slice(9, 15)  # of segments of 9, 6 and 20 tokens, which share tiles


def run_poisoned(which: str, value: float) -> list[Tensor]:
    """The results with some of a segment's q, k, v or gradient replaced."""
    prepare()
    case = Case(lengths=(9, 6, 20), normalizer=OWN)
    q, k, v = needing_gradients(*case.batches())
    k, v = q.with_values(k.values), q.with_values(v.values)
    plan = case.plan(q, k)
    weights = torch.linspace(-1, 1, v.values.numel() * 2).view(35, 2, 16).clone()
    with torch.no_grad():
        for name, x in (("q", q.values), ("k", k.values), ("v", v.values), ("g", weights)):
            if name in which:
                x[POISONED.start + 1, :, 3] = value
    out, rest = attend(q, k, v, plan=plan)
    grads = torch.autograd.grad((out * weights).sum() + rest.sum(), [q.values, k.values, v.values])
    return [out.detach(), rest.detach(), *grads]


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("which", mostly_slow(["q", "k", "v", "g", "qkvg"], "qkvg"))
def test_poison_stays_in_its_segment(which: str, value: float, interpreter: Worker) -> None:
    clean = interpreter.call("call_function", HERE, "run_poisoned", "", value)
    got = interpreter.call("call_function", HERE, "run_poisoned", which, value)
    others = torch.ones(35, dtype=torch.bool)
    others[POISONED] = False
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a[others], b[others])
        assert a[others].isfinite().all()
    row = POISONED.start + 1
    if which == "v":  # those who attend the key know of it
        assert not got[0][row : POISONED.stop].isfinite().any()
    if which == "g":  # and the gradients of the keys that the row attends
        assert not got[4][POISONED.start : row + 1].isfinite().all(-1).any()


def run_with_spare_rows() -> list[Tensor]:
    prepare()
    q, k, v = (fj.Jagged(x.values[:40], torch.tensor([0, 9, 20])) for x in make_qkv([40], dtype=torch.float32))
    q, k, v = needing_gradients(q, q.with_values(k.values), q.with_values(v.values))
    k, v = (q.with_values(x.values) for x in (k, v))
    plan = fj.plan(q, mask=fj.Causal(), normalizer=REST, max_tokens=40, max_length=16, block_size=16)
    out, rest = attend(q, k, v, plan=plan)
    grads = torch.autograd.grad((out**2).sum() + rest[:20].sum(), [q.values, k.values, v.values])
    return [out.detach(), rest.detach(), *grads]


def test_spare_rows_are_left_alone(interpreter: Worker) -> None:
    out, rest, *grads = interpreter.call("call_function", HERE, "run_with_spare_rows")
    assert (rest[20:] == 1).all()
    for x in (out, *grads):
        assert x[:20].any()
        assert not x[20:].any()


def run_compiled() -> tuple[list[int], list[int]]:
    """One graph for all batches, with the results of eager mode."""
    prepare()
    slopes = torch.full((2,), 0.1, requires_grad=True)
    g = torch.Generator().manual_seed(1)

    def attend(x: fj.Jagged) -> Tensor:
        keywords: dict[str, Any] = {"mask": fj.Causal(), "score": fj.Alibi(slopes), "backend": "triton"}
        out, rest = fj.attention(x, x, x, normalizer=REST, return_remainder=True, **keywords)  # type: ignore[misc]
        return out.values + rest.values[..., None]

    given = []
    for lengths in ([40, 33], [7, 0, 25], [3, 50, 0, 9]):
        values = torch.randn(sum(lengths), 2, 16, generator=g).requires_grad_()
        given.append((fj.Jagged.from_lengths(values, lengths),))

    def same(index: int, out: Tensor) -> None:
        x = given[index][0]
        eager = attend(x)
        assert torch.equal(out, eager)
        leaves = [x.values, slopes]
        for leaf, wanted in zip(leaves, torch.autograd.grad(eager.sum(), leaves), strict=True):
            # q, k and v are one tensor, whose three gradients a graph may add in another order.
            size = wanted.abs().max()
            torch.testing.assert_close(leaf.grad, wanted, rtol=0, atol=4 * torch.finfo(torch.float32).eps * float(size))
            leaf.grad = None

    graphs = assert_compiles(attend, given, backend="aot_eager", after_each=same)
    return graphs.forward, graphs.backward


@pytest.mark.slow
def test_one_graph_for_all_batches(interpreter: Worker) -> None:
    assert interpreter.call("call_function", HERE, "run_compiled") == ([0], [0])


def check_operators() -> None:
    prepare()
    from flexjag.backends.triton import stick_breaking as sticks

    case = Case(heads=2, groups=1, lengths=(20, 3), score=slopes_and_cap)
    q, k, v = (x.values for x in needing_gradients(*case.batches()))
    plan = case.plan(*case.batches()[:2])
    text = sticks.printed(plan)
    rest = (text.captures, text.learned, text.numbers, text.source, sticks.tiles_of(plan), 0.25, 16, True)
    torch.library.opcheck(sticks.attend, (q, k, v, *rest, False))
    torch.library.opcheck(sticks.attend, (q, k, v, *rest, True), test_utils=("test_schema", "test_faketensor"))
    given = (torch.randn(23, 2, 16), torch.randn(23, 2), q.detach(), k.detach(), v.detach())
    torch.library.opcheck(sticks.differentiate, (*given, *rest), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
def test_operators_are_what_they_claim(interpreter: Worker) -> None:
    interpreter.call("call_function", HERE, "check_operators")
