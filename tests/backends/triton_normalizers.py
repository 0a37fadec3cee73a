"""What a worker with Triton's interpreter runs: attention through the kernels of the backend ``triton``, on the CPU.

Tests name what is to be checked; masks and scores hold functions, so they are made here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from cases import make_qkv, needing_gradients
from torch import Tensor
from torch.nn import functional

import flexjag as fj
from flexjag.algebra.dropping import Dropped
from flexjag.algebra.masks import Not
from flexjag.algebra.normalizers import GELU, Identity, Pointwise, Sigmoid, SiLU
from flexjag.backends.triton import pointwise as triton_backend
from flexjag.backends.triton.modules import emit, load
from flexjag.codegen.run.interpreter import mend_interpreter
from flexjag.lowering import mods
from flexjag.printing import has_functions, read
from flexjag.testing import assert_compiles, assert_matches_reference

HEADS = 2
LENGTHS = [20, 7, 0, 18]
TOTAL = sum(LENGTHS)
LIMITS = torch.tensor([5, 0, 20, 11])
LEFT = torch.tensor([3.0, -1.0])
CAP = torch.tensor(1.5)
PAIRS = torch.tensor([[0.5, -1.0], [2.0, 0.25]])


def ids(tokens: int, size: int = 7) -> Tensor:
    return torch.arange(tokens) // size % 3


MASKS: dict[str, Callable[[int], fj.Mask]] = {
    "full": lambda tokens: fj.Full(),
    "causal": lambda tokens: fj.Causal(),
    "causal, end": lambda tokens: fj.Causal("end"),
    "sinks": lambda tokens: fj.Causal() & (fj.Window(3, 0) | fj.Prefix(2)),
    "chunked": lambda tokens: fj.Chunked(8),
    "no window": lambda tokens: ~fj.Window(9, 4),
    "no key": lambda tokens: ~fj.Full(),
    "rows": lambda tokens: fj.Rows(torch.arange(tokens) % 5, torch.arange(tokens) % 5 + 9),
    "groups": lambda tokens: fj.Causal() & fj.SameGroup(ids(tokens)),
    "other groups": lambda tokens: ~fj.SameGroup(ids(tokens)),
    "heads": lambda tokens: fj.PerHead([fj.Causal(), fj.Window(5, 5) & ~fj.SameGroup(ids(tokens))]),
    "function": lambda tokens: fj.MaskMod(lambda b, h, q, kv: (q % 3 != 0) & (kv <= q) & ~((b == 1) & (kv == 2))),
    "sum of bools": lambda tokens: fj.MaskMod(lambda b, h, q, kv: ((q >= kv) + (kv == 0)) * (kv != 3) > 0),
    "function and tensors": lambda tokens: fj.MaskMod(lambda b, h, q, kv: (kv < LIMITS[b]) | (q - kv == h)),
}
"""Masks by the number of tokens, of keys and queries alike."""


def _bend(x: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    far = torch.abs(q - kv).float()
    bent = torch.where(far > 4, torch.tanh(x) * 2, torch.exp(-x * x) + torch.sigmoid(x))
    return bent + LEFT[h - 2] / (1 + far) - torch.sqrt(far + 1) * 0.1 + torch.clamp(x, -1.5, 1.5) ** 3


def _whole(x: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    step = (q - kv) // 3 - torch.remainder(kv - q, 4) + torch.minimum(q, kv) % 2
    return x * torch.where((step > 0) ^ (h == 1), 1.0, 0.5) + step / 7 + torch.maximum(x, -x) * 0.25


def _more(x: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    size = torch.abs(x) + 1
    grown = torch.exp2(-size) + torch.log(size) * torch.log2(size) + torch.rsqrt(size) + torch.relu(x)
    return grown + torch.sin(x) * torch.cos(x) + torch.erf(x) + torch.floor(x) * 0.1 - torch.ceil(x) * 0.2


def _smooth(x: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    grown = functional.silu(x) + functional.gelu(x) - functional.gelu(x, approximate="tanh") * 0.5
    return grown + torch.where(q % 2 == 0, x * 0.3, x * 0.7)


SCORES: dict[str, Callable[[int], fj.Score | None]] = {
    "none": lambda tokens: None,
    "alibi": lambda tokens: fj.Alibi(torch.tensor([0.3, -0.2])),
    "cap": lambda tokens: fj.SoftCap(0.5),
    "relative": lambda tokens: fj.RelativeBias(rand(HEADS, 17)),
    "relative, far": lambda tokens: fj.RelativeBias(rand(HEADS, 201)),
    "buckets": lambda tokens: fj.BucketedBias(rand(HEADS, 4), torch.tensor([-8, 0, 8])),
    "buckets with strides": lambda tokens: fj.BucketedBias(rand(HEADS, 4), torch.tensor([-8, 99, 0, 99, 8])[::2]),
    "no bucket": lambda tokens: fj.BucketedBias(rand(HEADS, 1), torch.zeros(0)),
    "times": lambda tokens: fj.TimeBias(rand(HEADS, 9), times(tokens), fj.TimeBias.log_boundaries(8)),
    "times in half hours": lambda tokens: fj.TimeBias(
        rand(1, 6).expand(HEADS, 6), times(tokens) / 2, torch.arange(5.0)
    ),
    "chain": lambda tokens: fj.Alibi(rand(HEADS)) >> fj.SoftCap(2.0) >> fj.RelativeBias(rand(HEADS, 9)),
    "function": lambda tokens: fj.ScoreMod(_bend),
    "function of more functions": lambda tokens: fj.ScoreMod(_more),
    "function of activations": lambda tokens: fj.ScoreMod(_smooth),
    "function of a table's row": lambda tokens: fj.ScoreMod(lambda x, b, h, q, kv: x + PAIRS[1, q % 2]),
    "function of whole numbers": lambda tokens: fj.ScoreMod(_whole),
    "function without the product": lambda tokens: fj.ScoreMod(lambda x, b, h, q, kv: (q - kv).to(x.dtype)),
    "function of the head": lambda tokens: fj.ScoreMod(lambda x, b, h, q, kv: LEFT[h].to(x.dtype)),
    "function of the query": lambda tokens: fj.ScoreMod(lambda x, b, h, q, kv: q.to(x.dtype) / 10),
    "detached": lambda tokens: fj.ScoreMod(lambda x, b, h, q, kv: x * x.detach() + (x.clamp(-1, 1) - x).detach()),
    "dropped": lambda tokens: (
        fj.Alibi(torch.tensor([0.3, -0.2]))
        >> Dropped(torch.tensor(2**62 + 5), torch.tensor(-(2**30), dtype=torch.int32), HEADS)
    ),
    "clamped by tensors": lambda tokens: fj.ScoreMod(
        lambda x, b, h, q, kv: x.clamp(min=-CAP, max=CAP) * np.float64(0.5)
    ),
}


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def times(tokens: int) -> Tensor:
    return torch.arange(tokens) ** 2 % 311


NORMALIZERS: dict[str, Callable[[int], Pointwise]] = {
    "silu": lambda tokens: SiLU(0.25),
    "silu, scaled rows": lambda tokens: SiLU(torch.linspace(0.5, 2, tokens)),
    "gelu": lambda tokens: GELU(),
    "gelu, tanh": lambda tokens: GELU(0.5, approximate="tanh"),
    "identity": lambda tokens: Identity(torch.tensor(0.125)),
    "sigmoid": lambda tokens: Sigmoid(),
    "sigmoid, number": lambda tokens: Sigmoid(-2.0, 3.0),
    "sigmoid, heads": lambda tokens: Sigmoid(torch.tensor([0.3, -1.0])),
}


@cache
def prepare() -> None:
    torch.set_num_threads(1)
    mend_interpreter()


@triton.jit
def evaluate(
    s, ds, score, slope, allowed, captures, numbers, T,
    MASK: tl.constexpr, SCORE: tl.constexpr, DSCORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The printed functions at every pair of tokens of one head."""
    h = tl.program_id(0)
    q, kv = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (q < T) & (kv < T)
    place = (h * T + q) * T + kv
    i, j = tl.minimum(q, T - 1), tl.minimum(kv, T - 1)
    x = tl.load(s + place, mask=inside, other=0.0)
    dx = tl.load(ds + place, mask=inside, other=0.0)
    tl.store(score + place, SCORE(x, h, i, j, captures, numbers), mask=inside)
    tl.store(slope + place, DSCORE(dx, x, h, i, j, captures, numbers), mask=inside)
    ok = MASK(h, i, j, captures, numbers) & inside
    tl.store(allowed + place, ok.to(tl.int8), mask=inside)


def print_mods(mask: str, score: str) -> tuple[Any, ...]:
    """The printed functions and the plan's own at every pair of tokens: mask, score, and the score's gradient."""
    prepare()
    x = fj.Jagged.from_lengths(torch.zeros(TOTAL), LENGTHS)
    plan = fj.plan(x, mask=MASKS[mask](TOTAL), score=SCORES[score](TOTAL), block_size=16)
    printed = emit(
        plan.mask_mod,
        mods.score_mod(plan.kernel_score, replace(plan.tables, look_up=read)),
        has_functions(plan.mask, plan.score),
    )
    made = load(printed.source)
    s, ds = (torch.randn(HEADS, TOTAL, TOTAL, generator=torch.Generator().manual_seed(i)) for i in range(2))
    found, slope = torch.empty_like(s), torch.empty_like(s)
    allowed = torch.empty(s.shape, dtype=torch.int8)
    functions = {"MASK": made.mask, "SCORE": made.score, "DSCORE": made.dscore}
    evaluate[(HEADS,)](
        s, ds, found, slope, allowed, tuple(printed.captures), tuple(printed.numbers), TOTAL, **functions, BLOCK=128
    )
    at = torch.zeros(()), *torch.meshgrid(torch.arange(HEADS), torch.arange(TOTAL), torch.arange(TOTAL), indexing="ij")
    wanted = plan.mask_mod(*at).expand(s.shape)
    leaf = s.clone().requires_grad_()
    value = leaf if plan.score_mod is None else plan.score_mod(leaf, *at).to(s.dtype)
    by_torch = torch.zeros_like(s)
    if value.requires_grad:
        by_torch = torch.autograd.grad(value, leaf, ds)[0]
    plain = made.plain_mask(*at[1:], printed.captures, printed.numbers).expand(s.shape)
    plain_score = made.plain_score(s, *at[1:], printed.captures, printed.numbers).expand(s.shape)
    return allowed.bool(), wanted, plain, found, value.detach(), plain_score, slope, by_torch


def match(
    shapes: Sequence[dict[str, Any]],
    masks: Sequence[str],
    normalizers: Sequence[str],
    scores: Sequence[str] = ("none",),
    block: int = 16,
) -> int:
    """Compare forward and backward with the reference for every combination; how many there were."""
    prepare()
    count = 0
    for shape in shapes:
        q, k, v = make_qkv(**{"dtype": torch.float32, "heads": HEADS, **shape})
        tokens = q.values.shape[0]
        for mask in masks:
            for normalizer in normalizers:
                for score in scores:
                    parts = {"mask": MASKS[mask](tokens), "score": SCORES[score](tokens)}
                    plan = fj.plan(q, k, **parts, normalizer=NORMALIZERS[normalizer](tokens), block_size=block)
                    assert_matches_reference(q, k, v, plan=plan, backend="triton", lse=False)
                    count += 1
    return count


def learn(backend: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The output and the gradients of everything that can be learned at once, in float64 by the reference."""
    prepare()
    compute = torch.float64 if backend == "reference" else torch.float32
    batches = make_qkv(LENGTHS, heads=4, groups=2, dtype=dtype)
    q, k, v = (x.with_values(x.values.to(compute if backend == "reference" else dtype)) for x in batches)
    q, k, v = needing_gradients(q, k, v)
    k = q.with_values(k.values)
    leaves = [rand(4), rand(4, 9), rand(4, 5), rand(4), torch.linspace(0.5, 2, TOTAL), rand(3)]
    slopes, table, buckets, bias, scale, weights = leaves = [x.to(compute).requires_grad_() for x in leaves]

    def own(x: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return x * weights[h % 3] + weights[2] * torch.tanh(x)

    time = fj.TimeBias(buckets, times(TOTAL), torch.tensor([1, 5, 30, 100]))
    score = fj.Alibi(slopes) >> fj.SoftCap(2.0) >> fj.RelativeBias(table.exp()) >> time >> fj.ScoreMod(own)
    plan = fj.plan(q, mask=fj.Causal(), score=score, normalizer=Sigmoid(bias, scale), block_size=16)
    out = fj.attention(q, k, q.with_values(v.values), plan=plan, backend=backend).values
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum()
    return out.detach(), list(torch.autograd.grad(loss, [q.values, k.values, v.values, *leaves]))


def attend(
    lengths: list[int], mask: str, normalizer: str, change: dict[str, float], segment: int = 1, repeat: int = 1
) -> list[list[Tensor]]:
    """Output and gradients, with the values of one segment changed; the gradient is the other segments' outputs'."""
    prepare()
    found = []
    tokens = sum(lengths)
    rows = slice(sum(lengths[:segment]), sum(lengths[: segment + 1]))
    others = torch.ones(tokens, dtype=torch.bool)
    others[rows] = False
    for _ in range(repeat):
        values = {}
        for name, x in zip("qkv", make_qkv(lengths, dtype=torch.float32), strict=True):
            values[name] = x.values.clone()
            if name in change:
                values[name][rows] = change[name]
        q, k, v = (fj.Jagged.from_lengths(x.requires_grad_(), lengths) for x in values.values())
        k, v = q.with_values(k.values), q.with_values(v.values)
        plan = fj.plan(q, mask=MASKS[mask](tokens), normalizer=NORMALIZERS[normalizer](tokens), block_size=16)
        out = fj.attention(q, k, v, plan=plan, backend="triton").values
        back = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        back[rows] = change.get("grad", 0.0)
        found.append([out.detach(), *torch.autograd.grad(out, [q.values, k.values, v.values], back)])
    return found


def fill_capacity(normalizer: str) -> list[Tensor]:
    """Output and gradients of 48 tokens in a plan for 64, whose spare rows hold large numbers."""
    prepare()
    lengths, tokens = [30, 0, 17, 1], 64
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    values = [
        torch.cat([x.values, x.values.new_full((16, *x.values.shape[1:]), 1e4)]).requires_grad_()
        for x in make_qkv(lengths, dtype=torch.float32)
    ]
    q, k, v = (fj.Jagged(x, offsets) for x in values)
    k, v = q.with_values(k.values), q.with_values(v.values)
    options = {"max_tokens": tokens, "max_length": 30, "block_size": 16}
    plan = fj.plan(q, mask=fj.Causal(), normalizer=NORMALIZERS[normalizer](tokens), **options)
    out = fj.attention(q, k, v, plan=plan, backend="triton").values
    return [out.detach(), *torch.autograd.grad((out**2).sum(), values)]


def check_operators() -> None:
    """``opcheck`` of the three operators, with a bias that is learned and without."""
    prepare()
    for bias in (None, rand(HEADS).requires_grad_()):
        q, k, v = (x.values for x in needing_gradients(*make_qkv([20, 0, 3], heads=HEADS, dtype=torch.float32)))
        x = fj.Jagged.from_lengths(q, [20, 0, 3])
        normalizer = SiLU() if bias is None else Sigmoid(bias)
        plan = fj.plan(x, mask=fj.Causal(), normalizer=normalizer, block_size=16)
        text, tables = triton_backend.printed(plan), triton_backend.tables_of(plan)
        tiles = [plan.tiles.all_heads.row, plan.tiles.all_heads.col]
        name, grad = triton_backend.name_of(normalizer), torch.randn_like(v)
        given = (q, k, v, text.captures, text.learned, text.numbers, text.source)
        torch.library.opcheck(triton_backend.attend, (*given, *tables, tiles, name, 0.25, 1.0, 16, False))
        q, k, v = (y.detach() for y in (q, k, v))
        captures, tests = [y.detach() for y in text.captures], ("test_schema", "test_faketensor")
        arguments = (grad, q, k, v, captures, text.numbers, text.source, *tables, name, 0.25, 1.0, 16)
        torch.library.opcheck(triton_backend.differentiate, arguments, test_utils=tests)
        arguments = (grad, q, k, v, captures, text.learned, text.numbers, text.source, tiles, name, 0.25, 1.0, 16)
        torch.library.opcheck(triton_backend.differentiate_learned, arguments, test_utils=tests)


def trace(batches: Sequence[list[int]]) -> tuple[list[int], list[int]]:
    """Compile an attention call with learned tensors for several batches, and compare each with the eager call."""
    prepare()
    slopes, table = rand(HEADS).requires_grad_(), rand(HEADS, 9).requires_grad_()
    bias = rand(HEADS).requires_grad_()

    def call(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged, groups: Tensor, scale: Tensor) -> Tensor:
        score = fj.Alibi(slopes) >> fj.SoftCap(3.0) >> fj.RelativeBias(table)
        mask = fj.Causal() & Not(fj.SameGroup(groups))
        first = fj.attention(q, k, v, mask=mask, score=score, normalizer=Sigmoid(bias), backend="triton")
        return fj.attention(first, k, v, mask=fj.Causal(), normalizer=SiLU(scale), backend="triton").values

    given = []
    for lengths in batches:
        q, k, v = needing_gradients(*make_qkv(lengths, dtype=torch.float32))
        groups, scale = ids(sum(lengths)), torch.linspace(0.1, 1, sum(lengths))
        for x in (groups, scale):
            torch._dynamo.maybe_mark_dynamic(x, 0)
        given.append((q, q.with_values(k.values), q.with_values(v.values), groups, scale))

    def same(index: int, out: Tensor) -> None:
        eager = call(*given[index])
        assert torch.equal(out, eager)
        leaves = [*(x.values for x in given[index][:3]), slopes, table, bias]
        for leaf, wanted in zip(leaves, torch.autograd.grad(eager.sum(), leaves), strict=True):
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, wanted)
            leaf.grad = None

    graphs = assert_compiles(call, given, after_each=same, backend="aot_eager")
    return graphs.forward, graphs.backward


def list_kernels(features: int, dtype: torch.dtype) -> list[Any]:
    """The plainest and the heaviest kernels of the backend; with care only the plainest, which are rarely run."""
    from flexjag.codegen.own import attention as triton_kernels

    found = triton_kernels.list_kernels(features, dtype)
    heavy = [x for x in found if x.op == "silu, position and time bias" and not x.constants["CAREFUL"]]
    return [x for x in found if x.op == "silu"] + heavy
