"""FlexAttention's own CUDA kernels, lowered from plans and run in Triton's interpreter, against the dense reference."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import make_qkv, mostly_slow

import flexjag as fj
from flexjag.codegen.worker import Worker
from flexjag.testing import assert_kernels_match
from flexjag.testing.oracle import Result, Trial, check_against_reference

pytest.importorskip("triton")
LENGTHS = [100, 3, 0, 150, 47]
QKV = tuple[fj.Jagged, fj.Jagged, fj.Jagged]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(interpret=True) as running:
        yield running


def learned(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).mul_(0.3).requires_grad_()


def small(**options: object) -> QKV:
    return make_qkv(LENGTHS, **{"dtype": torch.float32, "dim": 32} | options)  # type: ignore[arg-type]


def learned_score() -> fj.Score:
    bias = learned(5)
    return fj.ScoreMod(lambda x, b, h, q, kv: x + bias[(q - kv) % 5])


def few_rows(qkv: QKV) -> fj.Mask:
    """Every third row has no key, the others two spans."""
    pos = qkv[0].positions
    lo = torch.stack([pos - 20, pos + 2]).clamp(min=0).int()
    hi = torch.stack([pos - 3, torch.where(pos % 3 == 0, 0, pos + 30)]).clamp(min=0).int()
    hi = torch.where((pos % 3 == 0)[None], lo, hi)
    return fj.Rows(lo, hi)


def dense(qkv: QKV) -> fj.Mask:
    areas = sum(n * n for n in LENGTHS)
    return fj.Dense(torch.rand(areas) < 0.4)


def looked_up() -> tuple[torch.Tensor, torch.Tensor]:
    """A table ``[7, 3]``, and for each position of the longest segment where its span starts and ends."""
    pos = torch.arange(max(LENGTHS))
    return torch.rand(7, 3, generator=torch.Generator().manual_seed(1)), torch.stack([pos // 2, pos + 20], 1)


def constant_indices() -> fj.Score:
    table, _ = looked_up()

    def score(x: torch.Tensor, *at: torch.Tensor) -> torch.Tensor:
        _, _, q, kv = at
        row = table[q % 7]
        return x + table[kv % 2, 0] - table[-2, kv % 3] + table[q % 7, -1] * row[-2] + table[2, 1]

    return fj.ScoreMod(score)


def within_spans(_: QKV) -> fj.Mask:
    _, spans = looked_up()

    def mask(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        row = spans[kv]
        return (q >= row[0]) & (q < row[-1]) & (spans[q, -1] >= kv) & (kv >= spans[q, 0] - 30)

    return fj.MaskMod(mask)


def scalars() -> fj.Score:
    table, _ = looked_up()
    two, half, yes, flags = torch.tensor(2), torch.tensor(0.5), torch.tensor(True), torch.tensor([True, False])

    def score(x: torch.Tensor, *at: torch.Tensor) -> torch.Tensor:
        _, _, q, kv = at
        warm = torch.where(yes & (q > kv), x * half, torch.tensor(-1.0))
        return warm + table[two, kv % 3] + flags[kv % 2] + table[kv % 7, int(True)] * 3 + torch.full_like(x, 2.0)

    return fj.ScoreMod(score)


def scalar_conditions(_: QKV) -> fj.Mask:
    two, yes, flags = torch.tensor(2), torch.tensor(True), torch.tensor([True, False])

    def mask(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        allowed = (q >= kv - two) & yes & (flags[q % 2] | torch.ones_like(q, dtype=torch.bool))
        return allowed | torch.tensor(False)

    return fj.MaskMod(mask)


def learned_from_the_end() -> fj.Score:
    table = learned(2, 7, 3)
    return fj.ScoreMod(lambda x, b, h, q, kv: x + table[h, (q - kv) % 7 - 7, -1])


PLANS: dict[str, tuple[Callable[[], QKV], Callable[[QKV], fj.Mask], Callable[[], fj.Score | None]]] = {
    "full+softcap": (small, lambda _: fj.Full(), lambda: fj.SoftCap(3.0)),
    "causal": (small, lambda _: fj.Causal(), lambda: None),
    "causal(end), other offsets": (
        lambda: make_qkv([30, 3, 5, 200], [100, 0, 5, 81], dtype=torch.float32, dim=32),
        lambda _: fj.Causal(align="end"),
        lambda: None,
    ),
    "window|prefix+alibi": (
        small,
        lambda _: fj.Causal() & (fj.Window(20, 0) | fj.Prefix(4)),
        lambda: fj.Alibi(learned(2)),
    ),
    "prefix-LM": (small, lambda _: fj.Causal() | fj.Prefix(torch.tensor([7, 1, 0, 99, 0])), lambda: None),
    "chunked+relative bias": (small, lambda _: fj.Chunked(32), lambda: fj.RelativeBias(learned(2, 33))),
    "global+window": (small, lambda _: fj.GlobalTokens(2) | fj.Window(9, 9), lambda: None),
    "rows, some without keys": (small, few_rows, lambda: fj.Alibi(learned(2))),
    "groups+GQA": (
        lambda: small(heads=4, groups=2),
        lambda _: fj.SameGroup(torch.arange(300) // 17 % 3) & fj.Causal(),
        lambda: None,
    ),
    "dense, E != D": (lambda: small(dim=32, value_dim=64), dense, lambda: None),
    "opaque+learned score": (
        small,
        lambda _: fj.Causal() & fj.MaskMod(lambda b, h, q, kv: (q - kv) % 3 < 2),
        learned_score,
    ),
    "constant indices": (small, within_spans, constant_indices),
    "numbers of no dimension": (small, scalar_conditions, scalars),
    "learned, from the end": (small, lambda _: fj.Causal(), learned_from_the_end),
    "per head": (
        small,
        lambda _: fj.PerHead([fj.Causal(), fj.Window(16, 16) & ~fj.Prefix(3)]),
        lambda: fj.Alibi(learned(2)) >> fj.SoftCap(2.0),
    ),
    "rows without keys": (small, lambda _: ~fj.Causal(), lambda: None),
    "one tile exactly": (
        lambda: make_qkv([60, 68], dtype=torch.float32, dim=32),
        lambda _: fj.Causal(),
        lambda: None,
    ),
    "bfloat16": (lambda: small(dtype=torch.bfloat16), lambda _: fj.Causal(), lambda: fj.Alibi(learned(2))),
}


@pytest.mark.slow
def test_fixed_capacity_needs_no_bounds_and_stays_inside(worker: Worker) -> None:
    """Whole tiles of the plan's own size: with tiles of 256, 384 tokens are none. What spare rows hold goes nowhere."""
    for lengths, tokens, block in (([100, 0, 30], 256, 128), ([256, 128], 384, 256)):
        q, k, v = make_qkv(lengths, dtype=torch.float32, dim=32)
        spare = torch.full((tokens - sum(lengths), 2, 32), torch.nan)
        q, k, v = (fj.Jagged(torch.cat([x.values, spare]), q.offsets) for x in (q, k, v))
        plan = fj.plan(q, mask=fj.Causal(), max_tokens=tokens, block_size=block)
        exact = [x.values.detach().clone().requires_grad_() for x in (q, k, v)]
        want = fj.attention(*(q.with_values(x) for x in exact), plan=plan, backend="reference").values
        grad = torch.randn_like(want)
        grad[sum(lengths) :] = torch.nan
        report = fj.compile_for("sm_90", plan, q, k, v, assemble=False, worker=worker)
        out, grads = report.simulate(q, k, v, grad, worker=worker)
        assert want.isfinite().all()
        torch.testing.assert_close(out.values, want, atol=1e-5, rtol=1e-5)
        for x, wanted in zip((q, k, v), torch.autograd.grad(want, exact, grad), strict=True):
            torch.testing.assert_close(grads[x.values], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_tables_learn_in_float32(dtype: torch.dtype, worker: Worker) -> None:
    """Their gradients are sums over all scores: rounded once, not after each addend."""
    q, k, v = small(dtype=dtype)
    exact, table = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True), torch.zeros(2, 3, dtype=torch.bfloat16)
    plan = fj.plan(q, mask=fj.Causal(), score=fj.RelativeBias(table.requires_grad_()))
    grad = v.values.detach() * 10
    report = fj.compile_for("sm_90", plan, q, k, v, assemble=False, worker=worker)
    _, grads = report.simulate(q, k, v, grad, worker=worker)
    wide = [x.with_values(x.values.detach().double()) for x in (q, k, v)]
    want = fj.attention(*wide, mask=fj.Causal(), score=fj.RelativeBias(exact), backend="reference").values
    (wanted,) = torch.autograd.grad(want, [exact], grad.double())
    assert grads[table].dtype == torch.bfloat16
    rounding = torch.finfo(torch.bfloat16).eps / 2 * wanted.abs()  # of the gradient, once
    other = 4 * torch.finfo(dtype).eps * wanted.abs().max()  # of q·k, of weights and of what flows back
    assert bool(((grads[table].double() - wanted).abs() <= rounding + other).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["out", "lse", "grad_q", "grad_k", "grad_v", "grad_learned[0]"])
def test_an_error_of_a_tenth_is_noticed(which: str, dtype: torch.dtype) -> None:
    """The comparison itself, of the reference with one of its results made smaller."""
    qkv = small(dtype=dtype)
    plan = fj.plan(qkv[0], mask=fj.Causal(), score=fj.Alibi(learned(2)))
    trial = Trial.make(*qkv, plan, None, None, lse=True, backward=True, seed=0)

    def run(factor: float) -> Callable[[Result], Result]:
        def result(exact: Result) -> Result:
            named = {"out": exact.out, "lse": exact.lse}
            named |= dict(zip(["grad_q", "grad_k", "grad_v", "grad_learned[0]"], exact.grads, strict=True))
            named[which] = named[which] * factor
            out, lse, *grads = named.values()
            return Result(out, lse, grads)

        return result

    check_against_reference(trial, run(1.0), "same", dtype, norms=True)
    with pytest.raises(AssertionError, match=re.escape(which)):
        check_against_reference(trial, run(0.9), "smaller", dtype, norms=True)


@pytest.mark.slow
def test_the_blocks_that_users_get(worker: Worker) -> None:
    qkv = small(dtype=torch.float16)
    plan = fj.plan(qkv[0], mask=fj.Causal(), score=fj.RelativeBias(learned(2, 17)))
    assert_kernels_match(plan, *qkv, kernel_options={}, worker=worker)


@pytest.mark.slow
def test_one_tensor_as_queries_keys_and_values(worker: Worker) -> None:
    x = small()[0]
    plan = fj.plan(x, mask=fj.Causal())
    assert_kernels_match(plan, x, x, x, worker=worker)
    grad = torch.randn_like(x.values)
    report = fj.compile_for("sm_90", plan, x, x, x, assemble=False, worker=worker)
    _, grads = report.simulate(grad_out=grad, worker=worker)
    leaf = x.values.detach().clone().requires_grad_()
    own = x.with_values(leaf)
    want = fj.attention(own, own, own, plan=plan, backend="reference").values
    (wanted,) = torch.autograd.grad(want, [leaf], grad)
    torch.testing.assert_close(grads[x.values], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", mostly_slow(PLANS, "window|prefix+alibi", "rows without keys"))
def test_kernels_equal_the_reference(name: str, worker: Worker) -> None:
    make, make_mask, make_score = PLANS[name]
    qkv = make()
    plan = fj.plan(*qkv[:2], mask=make_mask(qkv), score=make_score())
    assert_kernels_match(plan, *qkv, worker=worker)
