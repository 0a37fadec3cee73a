"""Suite ``attention``: masks, scores and distributions of lengths, against loops, padding and PyTorch's own kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexjag.algebra.facts import as_window
from flexjag.algebra.masks import Window
from flexjag.api.attention import attention
from flexjag.api.plan import plan
from flexjag.bench.arms import attention as arms_of
from flexjag.bench.arms.attention import (
    AUTO,
    DENSE,
    FLEX,
    LOOP,
    PADDED,
    SHARED,
    SLICED,
    VARLEN,
    WITH_PLAN,
    AttentionBatch,
)
from flexjag.bench.arms.kinds import KINDS, useful_flops
from flexjag.bench.arms.product import PRODUCT, product, product_flops
from flexjag.bench.measuring.lengths import constant_lengths, document_lengths, lognormal_lengths, meta_lengths
from flexjag.bench.measuring.measure import Results, ratio
from flexjag.bench.measuring.padded import Expected, Tensors, with_gradients
from flexjag.bench.suites.registry import Arm, Case, CaseResult, Figure, Options, suite
from flexjag.jagged import Jagged

SPARSITIES = (0.1, 0.5, 0.95)
LOGNORMAL, DOCUMENTS, CONSTANT = "log-normal", "documents", "constant"
GEMM = "large product"
BEYOND_VARLEN = ("window | prefix + ALiBi", "causal + trained relative bias")  # kinds that varlen_attn does not support
WINDOW = 256  # keys before the query in the cases of growing T
CHECKED = 4096  # leading tokens checked there: under a causal window they do not depend on the later ones


@dataclass(frozen=True)
class AttentionSizes:
    """Sizes of the suite's cases.

    Attributes:
        segments: Number of segments S.
        longest: Maximum length of a segment.
        meta: Parameter N of Meta's length generator.
        heads: Number of heads H.
        dims: Head dimensions D, one case each.
        tokens: Numbers of tokens T of the cases with one growing segment.
        gemm: Side of the matrices in the reference matrix product.
    """

    segments: int
    longest: int
    meta: int
    heads: int
    dims: tuple[int, ...]
    tokens: tuple[int, ...]
    gemm: int


QUICK_SIZES = AttentionSizes(6, 96, 48, 2, (16,), (512, 1024, 2048), 64)
SIZES = {
    "cpu": AttentionSizes(
        48, 1024, 512, 4, (64,), (8192, 32768, 131072), 2048
    ),  # log-normal lengths fill 27 % of their batch
    "cuda": AttentionSizes(16, 4096, 4096, 8, (64, 128), (8192, 32768, 131072), 8192),
}


def _sizes(options: Options) -> AttentionSizes:
    return QUICK_SIZES if options.quick else SIZES[options.device]


def _dtype(options: Options) -> torch.dtype:
    return torch.bfloat16 if options.device == "cuda" else torch.float32


def _lengths(name: str, sizes: AttentionSizes, seed: int) -> list[int]:
    if name == LOGNORMAL:
        return lognormal_lengths(sizes.segments, sizes.longest, seed)
    if name == DOCUMENTS:
        return document_lengths(sizes.segments * sizes.longest // 4, seed)
    if name == CONSTANT:
        return constant_lengths(sizes.segments, sizes.longest // 4)
    lengths = meta_lengths(sizes.segments, sizes.meta, float(name.removeprefix("sparsity ")), seed)
    return lengths if any(lengths) else [1, *lengths[1:]]


def _product(sizes: AttentionSizes, options: Options) -> Sequence[Arm]:
    return [product(sizes.gemm, _dtype(options), options.device, options.seed)]


def _growing(tokens: int, sizes: AttentionSizes, options: Options) -> Sequence[Arm]:
    """One segment under a causal window, forward and backward."""
    generator = torch.Generator().manual_seed(options.seed)
    dim, checked = sizes.dims[0], min(tokens, CHECKED)
    # Drawn for the largest T, so that the smaller batches are prefixes of it.
    drawn = torch.randn(max(sizes.tokens), 4, 1, dim, generator=generator)[:tokens].to(options.device, _dtype(options))
    leaves, grad = [x.contiguous().requires_grad_() for x in drawn[:, :3].unbind(1)], drawn[:, 3].contiguous()
    mask = Window(WINDOW, 0)

    def ours() -> Callable[[], Tensors]:
        q, k, v = (Jagged.from_lengths(x, [tokens]) for x in leaves)
        made = plan(q, mask=mask)
        return with_gradients(
            lambda: _values(attention(q, q.with_values(k.values), q.with_values(v.values), plan=made)), leaves, grad
        )

    def exact(dtype: torch.dtype) -> Tensors:
        first = [x[:checked].detach().to(dtype).requires_grad_() for x in leaves]
        q, k, v = (Jagged.from_lengths(x, [checked]) for x in first)
        out = _values(attention(q, k, v, mask=mask, backend="reference"))
        return known((out.detach(), *torch.autograd.grad(out, first, grad[:checked].to(dtype))))

    def known(results: Tensors) -> Tensors:
        """The rows of output and gradients that do not depend on tokens past :data:`CHECKED`."""
        out, dq, dk, dv = results
        return out[:checked], dq[:checked], dk[: checked - WINDOW], dv[: checked - WINDOW]

    expected = Expected(exact, grad.dtype, terms=dim)
    return [Arm(AUTO, ours, lambda got: expected.check(known(got)))]


def _values(out: Jagged | tuple[Jagged, Jagged]) -> Tensor:
    assert isinstance(out, Jagged)
    return out.values


def _name(kind: str, backward: bool, distribution: str, dim: int | None = None, half: bool = False) -> str:
    text = f"{kind}, {'forward + backward' if backward else 'forward'}, {distribution}"
    return text + ("" if dim is None else f", D {dim}") + (", bfloat16" if half else "")


def _window_name(tokens: int) -> str:
    return f"window of {WINDOW}, forward + backward, {tokens:,} tokens"


def _cpu_figures(options: Options, found: Results, flops: dict[str, int], sizes: AttentionSizes) -> list[Figure]:
    figures = [_bound(options, found, sizes)]
    others = [LOOP, PADDED, SHARED, DENSE, arms_of.PADDED_FLEX, arms_of.GYM, arms_of.NESTED]
    for distribution in (LOGNORMAL, "sparsity 0.5"):
        case = _name("causal", False, distribution)
        best = min((t for t in (found.seconds(case, arm) for arm in others) if t is not None), default=None)
        text = f"{case}: time of the fastest other / {AUTO}"
        figures.append(Figure(text, ratio(best, found.seconds(case, AUTO)), "x", ">= 0.95"))
    limits = {
        False: {PADDED: ">= 8", SHARED: ">= 8", LOOP: None},
        True: {SLICED: ">= 1.25", LOOP: ">= 1.25", PADDED: ">= 3", SHARED: ">= 3"},
    }
    for backward, wanted in limits.items():
        case = _name("causal", backward, LOGNORMAL)
        for arm in (AUTO, AUTO + WITH_PLAN):
            for other, limit in wanted.items():
                value = ratio(found.seconds(case, other), found.seconds(case, arm))
                figures.append(Figure(f"{case}: time of {other} / {arm}", value, "x", limit))
    case = _name("causal", True, LOGNORMAL)
    for other in (SHARED, PADDED):
        share = ratio(found.memory(case, AUTO), found.memory(case, other))
        figures.append(Figure(f"{case}: memory of {AUTO} / {other}", share, "x", "<= 0.3"))
    for kind in KINDS:
        case = _name(kind, True, LOGNORMAL)
        value = ratio(found.seconds(case, PADDED), found.seconds(case, AUTO))
        figures.append(Figure(f"{case}: time of {PADDED} / {AUTO}", value, "x"))
    small, *_, large = sizes.tokens
    grown = ratio(found.memory(_window_name(large), AUTO), found.memory(_window_name(small), AUTO))
    text = f"window of {WINDOW}: memory per token at {large:,} / at {small:,} tokens"
    figures.append(Figure(text, ratio(grown, large / small), "x", "<= 1.2"))
    return figures + _rates(found, flops, sizes)


def _bound(options: Options, found: Results, sizes: AttentionSizes) -> Figure:
    """Speed-up over padding of a kernel whose rate does not depend on the length: the ratio of scores computed."""
    lengths = _lengths(LOGNORMAL, sizes, options.seed)
    longest = max(lengths)
    padded, packed = len(lengths) * longest * (longest + 1), sum(n * (n + 1) for n in lengths)
    text = f"causal, {LOGNORMAL}: scores of {SHARED} / scores of the packed tokens"
    known = found.seconds(_name("causal", False, LOGNORMAL), SHARED) is not None
    return Figure(text, padded / packed if known else None, "x")


def _cuda_figures(options: Options, found: Results, flops: dict[str, int], sizes: AttentionSizes) -> list[Figure]:
    figures = []
    for dim in sizes.dims:
        case = _name("causal", True, "sparsity 0.5", dim)
        for other, time, memory in ((DENSE, ">= 9", ">= 22"), (SHARED, ">= 3", ">= 2.13")):  # 1 / (1 - 53 %)
            value = ratio(found.seconds(case, other), found.seconds(case, AUTO))
            figures.append(Figure(f"{case}: time of {other} / {AUTO}", value, "x", time))
            value = ratio(found.memory(case, other), found.memory(case, AUTO))
            figures.append(Figure(f"{case}: memory of {other} / {AUTO}", value, "x", memory))
        for backward, limit in ((False, ">= 0.9"), (True, ">= 0.85")):
            plain = _name("causal", backward, "sparsity 0.5", dim)
            auto = ratio(found.seconds(plain, VARLEN), found.seconds(plain, AUTO))
            figures.append(Figure(f"{plain}: speed of {AUTO} / {VARLEN}", auto, "x", ">= 0.95"))
            for arm in (AUTO, FLEX):
                kernels = ratio(found.kernel_seconds(plain, VARLEN), found.kernel_seconds(plain, arm))
                text = f"{plain}: speed of {arm} / {VARLEN}, kernels alone"
                figures.append(Figure(text, kernels, "x", ">= 0.95" if arm == AUTO else None))
            theirs = ratio(flops.get(plain), found.kernel_seconds(plain, VARLEN))
            for kind in KINDS:
                case = _name(kind, backward, "sparsity 0.5", dim)
                if case in flops and kind not in ("causal", "full"):
                    ours = ratio(flops[case], found.kernel_seconds(case, AUTO))
                    text = f"{case}: FLOP rate of {AUTO} / of {VARLEN}, causal; kernels alone"
                    figures.append(Figure(text, ratio(ours, theirs), "x", limit))
    return figures + _rates(found, flops, sizes)


def _rates(found: Results, flops: dict[str, int], sizes: AttentionSizes) -> list[Figure]:
    out = []
    for case, count in flops.items():
        rate = ratio(count, found.seconds(case, AUTO))
        if rate is not None and case.startswith("causal, "):
            out.append(Figure(f"{case}: useful rate of {AUTO}", rate / 1e9, "GFLOP/s"))
        for arm in (AUTO, FLEX, VARLEN):
            rate = ratio(count, found.kernel_seconds(case, arm))
            if rate is not None:
                out.append(Figure(f"{case}: useful rate of {arm}, kernels alone", rate / 1e9, "GFLOP/s"))
    rate = ratio(product_flops(sizes.gemm), found.seconds(GEMM, PRODUCT))
    return [*out, Figure(f"{GEMM}: rate of {PRODUCT}", None if rate is None else rate / 1e9, "GFLOP/s")]


def _figures(options: Options, cases: list[CaseResult]) -> list[Figure]:
    flops = {case.name: case.facts["flops"] for case in cases if "flops" in case.facts}
    make = _cuda_figures if options.device == "cuda" else _cpu_figures
    figures = make(options, Results(cases), flops, _sizes(options))
    return [Figure(f.text, f.value, f.unit) for f in figures] if options.quick else figures


@suite(
    "attention",
    "Masks and scores over distributions of lengths. Log-normal is e^5 in the median, sigma 0.9; sparsity is Meta's "
    "generator, documents have a long tail. Inputs are packed; arms that pad also unpad.",
    _figures,
)
def cases(options: Options) -> list[Case]:
    """All distributions for a causal mask, all masks and scores for one distribution, one case in half precision."""
    sizes = _sizes(options)
    if options.device == "cuda":
        # What limits compare comes first, and of that what compiles nothing.
        order = ["causal", *BEYOND_VARLEN]
        # With a time budget, only kinds with acceptance limits, because each compiles kernels.
        order += [kind for kind in KINDS if kind not in order] if options.budget is None else []
        grid = [(kind, b, "sparsity 0.5", dim, False) for kind in order for b in (True, False) for dim in sizes.dims]
        if options.budget is None:
            grid += [("causal", True, name, sizes.dims[0], False) for name in (LOGNORMAL, DOCUMENTS, CONSTANT)]
    else:
        spread = [LOGNORMAL, *(f"sparsity {s}" for s in SPARSITIES), DOCUMENTS, CONSTANT]
        dim = sizes.dims[0]
        grid = [("causal", b, name, dim, False) for b in (False, True) for name in spread]
        grid += [(kind, b, LOGNORMAL, dim, False) for kind in KINDS if kind != "causal" for b in (False, True)]
        grid += [("causal", b, LOGNORMAL, dim, True) for b in (False, True)]
    out = [_case(*point, sizes, options) for point in grid]
    facts = {"side": sizes.gemm, "dtype": str(_dtype(options)).removeprefix("torch.")}
    product, little = (partial(_product, x, options) for x in (sizes, QUICK_SIZES))
    out.append(Case(GEMM, facts, product, little, compiles=False))
    for tokens in sizes.tokens:
        facts = {"tokens": tokens, "segments": 1, "heads": 1, "dim": sizes.dims[0], "seed": options.seed}
        made, small = partial(_growing, tokens, sizes, options), partial(_growing, 512, QUICK_SIZES, options)
        out.append(Case(_window_name(tokens), facts, made, small, late=True))
    return out


def _needed(kind: str, backward: bool) -> tuple[str, ...]:
    """The arms that the limits on a GPU compare."""
    if kind != "causal":
        return (AUTO,)
    return (AUTO, VARLEN, SHARED, DENSE) if backward else (AUTO, VARLEN)


def _case(
    kind: str, backward: bool, distribution: str, dim: int, half: bool, sizes: AttentionSizes, options: Options
) -> Case:
    lengths = _lengths(distribution, sizes, options.seed)
    dtype = torch.bfloat16 if half else _dtype(options)
    facts: dict[str, Any] = {"segments": len(lengths), "tokens": sum(lengths), "longest": max(lengths)}
    facts |= {"fill": sum(lengths) / (len(lengths) * max(lengths)), "heads": sizes.heads, "dim": dim}
    facts |= {"dtype": str(dtype).removeprefix("torch."), "seed": options.seed}

    def batch(lengths: Sequence[int], heads: int, dim: int) -> AttentionBatch:
        return AttentionBatch(kind, lengths, heads, dim, dtype, backward, options.device, options.seed)

    # Other distributions of the same fill take the same memory.
    measured = backward and not half and (distribution == LOGNORMAL or options.device == "cuda")

    compiled = kind == "causal" and not half and (distribution == LOGNORMAL or options.device == "cuda")

    def arms(lengths: Sequence[int], heads: int, dim: int) -> Sequence[Arm]:
        made = batch(lengths, heads, dim).arms(compiled and not (options.quick and backward))
        return made if measured else [_unmeasured(arm) for arm in made]

    small = _lengths(LOGNORMAL, QUICK_SIZES, options.seed)
    facts["flops"] = useful_flops(kind, lengths, sizes.heads, dim, backward)
    name = _name(kind, backward, distribution, dim if options.device == "cuda" else None, half)
    run, warm = partial(arms, lengths, sizes.heads, dim), partial(arms, small, QUICK_SIZES.heads, QUICK_SIZES.dims[0])
    is_window = KINDS[kind].score is None and as_window(KINDS[kind].mask) is not None  # which varlen_attn takes
    return Case(name, facts, run, warm, _needed(kind, backward), compiles=not is_window)


def _unmeasured(arm: Arm) -> Arm:
    return Arm(arm.name, arm.make, arm.check, arm.needs, arm.absent, memory=False)
