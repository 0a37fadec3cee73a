"""Problems for the Triton kernels of the softmax, which a worker runs in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from cases import EDGE_LENGTHS, make_qkv, needing_gradients
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import flexjag as fj
from flexjag.algebra.dropping import Dropped
from flexjag.backends.triton import softmax
from flexjag.testing import Problem, assert_compiles, assert_matches_reference, assert_no_leak, problems

LENGTHS = (40, 7, 0, 33)
HOLES = fj.MaskMod(lambda b, h, q, kv: (q + kv + h) % 3 != 0)


@dataclass(frozen=True)
class Case:
    """One problem; tensors are made where it is run."""

    mask: Callable[[], fj.Mask] = fj.Causal
    lengths: tuple[int, ...] = LENGTHS
    kv_lengths: tuple[int, ...] | None = None
    score: Callable[[], fj.Score] | None = None
    heads: int = 2
    groups: int = 1
    dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    block: int = 16

    def batches(self) -> tuple[fj.Jagged, fj.Jagged, fj.Jagged]:
        kv_lengths = None if self.kv_lengths is None else list(self.kv_lengths)
        sizes = {"heads": self.heads, "groups": self.groups, "dim": self.dim, "value_dim": self.value_dim}
        return make_qkv(list(self.lengths), kv_lengths, **sizes, dtype=self.dtype)  # type: ignore[arg-type]

    def plan(self, q: fj.Jagged, k: fj.Jagged, **bounds: Any) -> fj.Plan:
        with torch.device(q.values.device):
            mask, score = self.mask(), None if self.score is None else self.score()
        return fj.plan(q, k, mask=mask, score=score, block_size=self.block, **bounds)


def slopes_and_cap() -> fj.Score:
    return fj.Alibi(torch.tensor([0.3, -0.2], requires_grad=True)) >> fj.SoftCap(2.0)


def table() -> fj.Score:
    return fj.RelativeBias(torch.linspace(-1, 1, 18).view(2, 9).sin().requires_grad_())


def half_table() -> fj.Score:
    return fj.RelativeBias(torch.linspace(-1, 1, 18).view(2, 9).sin().bfloat16().requires_grad_())


def ids() -> Tensor:
    return torch.arange(80) // 5 % 3


def pairs(heads: int, *sizes: int) -> fj.Score:
    return fj.DenseBias(torch.randn(heads, *sizes, generator=torch.Generator().manual_seed(0)).requires_grad_())


def dropped() -> fj.Score:
    """What dropout rules out, after a bias."""
    below, ids = torch.tensor(-(2**30), dtype=torch.int32), torch.tensor([3, -9, 2**40, 0])
    return slopes_and_cap() >> Dropped(torch.tensor(-(2**62) - 7), below, 2, ids)


PAIRS = sum(n * n for n in LENGTHS)
LONGER, SHORTER = (50, 20, 3, 1), (3, 0, 5, 40)
CASES: dict[str, Case] = {
    "causal": Case(),
    "full": Case(fj.Full, groups=2),
    "window": Case(lambda: fj.Window(5, 2)),
    "sinks": Case(lambda: fj.Causal() & (fj.Window(3, 0) | fj.Prefix(2))),
    "spans of any width": Case(lambda: fj.Chunked(6) | (fj.Window(20, -12 + 12) & ~fj.Window(7, 9))),
    "groups": Case(lambda: fj.Causal() & fj.SameGroup(ids())),
    "holes": Case(lambda: fj.Causal() & HOLES),
    "dense": Case(lambda: fj.Dense(torch.arange(1600).view(40, 40) % 7 != 2)),
    "per head": Case(lambda: fj.PerHead([fj.Causal(), fj.Window(3, 0)])),
    "per head, holes": Case(lambda: fj.PerHead([fj.Causal() & HOLES, fj.Prefix(9)])),
    "no key": Case(lambda: fj.Causal() & ~fj.Causal()),
    "longer keys": Case(lambda: fj.Causal("end"), kv_lengths=LONGER),
    "shorter keys": Case(fj.Full, kv_lengths=SHORTER),
    "one query each": Case(fj.Full, lengths=(1, 1, 0, 1), kv_lengths=(3, 0, 5, 90), heads=4),
    "grouped queries": Case(heads=6, groups=3),
    "three heads of a key": Case(heads=6, groups=2, dim=24, value_dim=3),
    "one feature": Case(dim=1, value_dim=5),
    "wide": Case(lengths=(20, 3), dim=136, value_dim=256, dtype=torch.bfloat16),
    "slopes, cap": Case(score=slopes_and_cap, groups=2),
    "table": Case(score=table),
    "bias of pairs": Case(score=lambda: pairs(2, PAIRS) >> pairs(1, PAIRS)),
    "bias of pairs, shared": Case(fj.Full, score=lambda: pairs(2, 40, 51) >> pairs(1, 41, 50), kv_lengths=LONGER),
    "table in bfloat16": Case(score=half_table, dtype=torch.bfloat16),
    "function": Case(lambda: HOLES, score=lambda: fj.ScoreMod(lambda x, b, h, q, kv: x * 0.5 + (q - kv) * 0.1)),
    "dropped": Case(fj.Full, score=dropped, kv_lengths=LONGER, groups=2),
    "float16": Case(dtype=torch.float16),
    "heights": Case(lengths=(300, 0, 20), heads=1, dtype=torch.float16),
    "heights, exact products": Case(lambda: fj.Window(100, 7), lengths=(300, 9), heads=1),
    "all heights": Case(lambda: fj.Window(200, 30), lengths=(600, 300, 9), heads=1, dtype=torch.bfloat16),
    "all heights, packed heads": Case(lengths=(300, 2), heads=8, groups=1, dtype=torch.bfloat16),
}


@cache
def prepare() -> None:
    """Make this process, a worker, one that can run the kernels."""
    from flexjag.codegen.run.interpreter import mend_interpreter

    torch.set_num_threads(1)
    mend_interpreter()


def compare(case: Case, *batches: fj.Jagged) -> dict[str, float]:
    """Errors of the output, the log-sum-exp and all gradients, as shares of what is allowed."""
    q, k, v = batches or case.batches()
    return assert_matches_reference(q, k, v, plan=case.plan(q, k), backend="triton", norms=True)


def compare_named(name: str) -> dict[str, float]:
    prepare()
    return compare(CASES[name])


def compare_edges() -> None:
    prepare()
    for lengths in EDGE_LENGTHS.values():
        compare(Case(lambda: fj.Causal() | HOLES, lengths=tuple(lengths), heads=1))


def compare_drawn(count: int, dtype: torch.dtype) -> None:
    """Compare random problems with the reference."""
    prepare()

    @settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(p=problems(dtype=dtype, max_total=40))
    def check(p: Problem) -> None:
        assert_matches_reference(p.q, p.k, p.v, plan=p.plan(), backend="triton", learned=p.learned)

    check()


def check_leaks() -> None:
    prepare()
    case = Case(lambda: fj.Causal() & HOLES)
    q, k, v = case.batches()
    assert_no_leak("triton", q, k, v, plan=case.plan(q, k))


def results(case: Case, lengths: tuple[int, ...] | None = None, first: int = 0, **changes: float) -> list[Tensor]:
    """Output, log-sum-exp and gradients, of a part of the batch and with changes to a token of one segment.

    Args:
        case: The problem, of self-attention.
        lengths: Lengths of the part.
        first: Its first token.
        changes: Values for a row of ``q``, ``k``, ``v`` or of the gradient ``g``.
    """
    batches = [x.values[first:] for x in case.batches()]
    lengths = case.lengths if lengths is None else lengths
    values = [x[: sum(lengths)].clone() for x in batches]
    values.append(torch.linspace(-1, 1, case.batches()[2].values.numel() * case.heads // case.groups))
    values[3] = values[3].view(-1, case.heads, case.value_dim)[first:][: sum(lengths)].to(case.dtype).clone()
    for name, value in changes.items():
        values["qkvg".index(name)][POISONED.start + 1, :, 3] = value
    q, k, v = needing_gradients(*(fj.Jagged.from_lengths(x, list(lengths)) for x in values[:3]))
    k, v = q.with_values(k.values), q.with_values(v.values)
    out, lse = fj.attention(q, k, v, plan=case.plan(q, k), return_lse=True, backend="triton")
    finite = torch.where(lse.values.isfinite(), lse.values, 0.0)
    loss = (out.values * values[3]).sum() + finite.sum()
    return [out.values.detach(), lse.values.detach(), *torch.autograd.grad(loss, [q.values, k.values, v.values])]


POISONED = slice(9, 15)  # of segments of 9, 6 and 20 tokens
SMALL = Case(lengths=(9, 6, 20))


def run_poisoned(which: str, value: float) -> list[Tensor]:
    prepare()
    return results(SMALL, **dict.fromkeys(which, value))


def run_apart() -> list[tuple[list[Tensor], list[Tensor]]]:
    """The results of each segment among others and alone; of segments of two heights."""
    prepare()
    case = Case(lambda: fj.Causal() & (fj.Window(30, 0) | fj.Prefix(2)), lengths=(9, 0, 270, 33), heads=1)
    together, found, first = results(case), [], 0
    for length in case.lengths:
        if length:
            found.append(([x[first : first + length] for x in together], results(case, (length,), first)))
        first += length
    return found


def run_again() -> tuple[list[Tensor], list[Tensor]]:
    prepare()
    found = []
    for _ in range(2):
        case = Case(score=table)
        q, k, v = needing_gradients(*case.batches())
        k, v = q.with_values(k.values), q.with_values(v.values)
        plan = case.plan(q, k)
        out = fj.attention(q, k, v, plan=plan, backend="triton").values
        learned = plan.score.table  # type: ignore[union-attr]
        grads = torch.autograd.grad(out.pow(2).sum(), [q.values, k.values, v.values, learned])
        found.append([out.detach(), *grads])
    return found[0], found[1]


def run_with_spare_rows() -> list[Tensor]:
    """The results of 20 tokens in a plan for 40, whose spare rows hold NaN."""
    prepare()
    q, k, v = (fj.Jagged(x.values[:40].clone(), torch.tensor([0, 9, 20])) for x in Case(lengths=(40,)).batches())
    for x in (q, k, v):
        x.values[20:] = torch.nan
    q, k, v = needing_gradients(q, q.with_values(k.values), q.with_values(v.values))
    k, v = (q.with_values(x.values) for x in (k, v))
    plan = Case().plan(q, k, max_tokens=40, max_length=16)
    out, lse = fj.attention(q, k, v, plan=plan, return_lse=True, backend="triton")
    grads = torch.autograd.grad((out.values**2).sum() + lse.values[:20].sum(), [q.values, k.values, v.values])
    return [out.values.detach(), lse.values.detach(), *grads]


def run_compiled() -> tuple[list[int], list[int]]:
    """One graph for all batches, with the results of eager mode."""
    prepare()
    slopes = torch.full((2,), 0.1, requires_grad=True)
    g = torch.Generator().manual_seed(1)

    def attend(x: fj.Jagged) -> Tensor:
        mask = fj.Causal() & (fj.Window(9, 0) | fj.Prefix(3))
        out, lse = fj.attention(x, x, x, mask=mask, score=fj.Alibi(slopes), return_lse=True, backend="triton")
        return out.values + lse.values[..., None]

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


def check_operators() -> None:
    """``opcheck`` of the two operators, with a learned score and masks of heads."""
    prepare()
    for case in (Case(lengths=(20, 3), score=slopes_and_cap), Case(lambda: fj.PerHead([fj.Causal(), HOLES]), (9, 8))):
        q, k, v = needing_gradients(*case.batches())
        given = arguments(q, k, v, case.plan(q, k))
        out, lse = softmax.attend(*given)
        torch.library.opcheck(softmax.attend, given)
        q, k, v, captures, *rest = (x.detach() if isinstance(x, Tensor) else x for x in given)
        backward = torch.randn(out.shape), torch.randn(lse.shape), out.detach(), lse.detach(), q, k, v
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            softmax.differentiate, (*backward, [x.detach() for x in captures], *rest), test_utils=tests
        )


def arguments(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged, plan: fj.Plan) -> tuple[Any, ...]:
    """What the backend passes to its operator."""
    found: list[tuple[Any, ...]] = []

    def attend(*given: Any) -> Any:
        found.append(given)
        return plain(*given)

    plain, softmax.attend = softmax.attend, attend  # type: ignore[assignment]
    try:
        softmax.run(q.values, k.values, v.values, plan, 0.25, True)
    finally:
        softmax.attend = plain
    return found[0]
