"""Dropout of attention weights: which are dropped, and what that does to output and gradients, for every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import CPP_SLOWLY, EDGE_LENGTHS, jagged
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flexjag as fj
from flexjag.algebra.dropping import Dropped
from flexjag.errors import BackendError, PlanError, ShapeError
from flexjag.testing import assert_compiles, assert_kernels_match

HEADS, GROUPS, DIM, VALUE = 4, 2, 8, 5
BACKENDS = ["reference", "tiled", "segments", CPP_SLOWLY]
LENGTHS = [20, 0, 7, 1, 33]
IDS = torch.tensor([5, 2**40, -3, 7, 0])
MASKS = [fj.Full(), fj.Causal(), fj.Window(-2, 6)]  # the last leaves rows without keys


def batch(
    lengths: list[int], kv_lengths: list[int] | None = None, dtype: torch.dtype = torch.float64
) -> tuple[fj.Jagged, fj.Jagged, fj.Jagged]:
    q = jagged(lengths, HEADS, DIM, dtype=dtype, seed=1)
    k, v = (jagged(kv_lengths or lengths, GROUPS, n, dtype=dtype, seed=n) for n in (DIM, VALUE))
    return tuple(x.with_values(x.values.requires_grad_()) for x in (q, k, v))  # type: ignore[return-value]


def attend(*given: Any, seed: int = 0, dropout: float = 0.3, **options: Any) -> Any:
    torch.manual_seed(seed)
    return fj.attention(*given, dropout=dropout, **options)


def kept(lengths: list[int], kv_lengths: list[int] | None = None, **options: Any) -> list[Tensor]:
    """Whether each weight is kept, ``[H, n, m]`` per segment: the values are unit vectors by position."""
    kv_lengths = kv_lengths or lengths
    q = jagged(lengths, HEADS, DIM, dtype=torch.float32)
    k = q if kv_lengths == lengths else jagged(kv_lengths, HEADS, DIM, dtype=torch.float32, seed=1)
    unit = torch.eye(max(40, *kv_lengths))  # of one size, so that one kernel does for all
    v = fj.Jagged.from_list([unit[:m, None] for m in kv_lengths]) if kv_lengths else k
    k = k.with_values(k.values[:, :1])
    out = attend(q, k, k.with_values(v.values), **options)
    pairs = zip(out.unbind(), kv_lengths, strict=True)
    return [x.transpose(0, 1)[:, :, :m] != 0 for x, m in pairs]


def dense(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged, mask: fj.Mask, rate: float, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by a softmax over keys and sink, of which the weights that :func:`kept` says are kept."""
    lengths = q.lengths.tolist()
    link = sum(x.values.flatten()[:0].sum() for x in (q, k, v)) + sinks[:0].sum()  # 0
    outs, sums = ([q.values.new_zeros(0, HEADS, *rest) + link] for rest in ((VALUE,), ()))
    for index, keep in enumerate(kept(lengths, dropout=rate, backend="reference") if lengths else []):
        n = lengths[index]
        x, y, z = (t[index].transpose(0, 1) for t in (q, k, v))
        y, z = (t.repeat_interleave(HEADS // GROUPS, 0) for t in (y, z))
        i, j = torch.arange(n)[:, None], torch.arange(n)
        allowed = {"Full": i == i, "Causal": j <= i, "Window": (j >= i + 2) & (j <= i + 6)}[type(mask).__name__]
        scores = (x @ y.transpose(1, 2) / DIM**0.5).masked_fill(~allowed, -torch.inf)
        scores = torch.cat([scores, sinks[:, None, None].expand(HEADS, n, 1)], 2)
        weights = scores.softmax(2)[:, :, :-1] * keep / (1 - rate)
        outs.append((weights @ z).transpose(0, 1))
        sums.append(scores.logsumexp(2).transpose(0, 1))
    return torch.cat(outs), torch.cat(sums)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize("lengths", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS)
def test_equals_a_softmax_with_weights_dropped(lengths: list[int], mask: fj.Mask, backend: str) -> None:
    q, k, v = batch(lengths)
    sinks = torch.tensor([-2.0, 0.0, 3.0, -torch.inf], dtype=torch.float64)[: HEADS - 1]
    sinks = torch.cat([sinks, sinks.new_full((1,), -50.0)]).requires_grad_()
    inputs = [q.values, k.values, v.values, sinks]
    out, lse = attend(q, k, v, mask=mask, sinks=sinks, return_lse=True, backend=backend)
    wanted = dense(q, k, v, mask, 0.3, sinks)
    torch.testing.assert_close((out.values, lse.values), wanted)
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in wanted]
    found = torch.autograd.grad((out.values, lse.values), inputs, weights)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, inputs, weights))


NORMALIZERS = [fj.SiLU(scale=0.1), fj.Sigmoid(), fj.GELU(), fj.Identity()]


@pytest.mark.parametrize("backend", ["tiled", "segments", CPP_SLOWLY])
@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=repr)
def test_weights_of_a_pointwise_normalizer_are_dropped(normalizer: fj.Normalizer, backend: str) -> None:
    """As if v were masked: the output is linear in the weights."""
    q, k, v = batch(LENGTHS)
    out = attend(q, k, v, normalizer=normalizer, backend=backend)
    grads = torch.autograd.grad(out.values.square().sum(), [x.values for x in (q, k, v)])
    functions = {"SiLU": torch.nn.functional.silu, "GELU": torch.nn.functional.gelu, "Identity": lambda s: s}
    wanted = []
    for i, keep in enumerate(kept(LENGTHS, backend="reference")):
        x, y, z = (t[i].transpose(0, 1) for t in (q, k, v))
        y, z = (t.repeat_interleave(HEADS // GROUPS, 0) for t in (y, z))
        scores = x @ y.transpose(1, 2) / DIM**0.5
        bias = -math.log(max(1, keep.shape[2]))
        weights = functions.get(type(normalizer).__name__, lambda s, b=bias: torch.sigmoid(s + b))(scores)
        wanted.append((weights * keep * (normalizer.scale / 0.7) @ z).transpose(0, 1))  # type: ignore[attr-defined]
    torch.testing.assert_close(out.values, torch.cat(wanted))
    by_hand = torch.autograd.grad(torch.cat(wanted).square().sum(), [x.values for x in (q, k, v)])
    torch.testing.assert_close(grads, by_hand)


@pytest.mark.parametrize("backend", ["tiled", "segments", "cpp"])
@pytest.mark.parametrize("kv_lengths", [None, [4, 9, 30, 0, 40]], ids=["self", "cross"])
@pytest.mark.parametrize("ids", [None, IDS], ids=["index", "ids"])
def test_every_backend_drops_the_same(backend: str, kv_lengths: list[int] | None, ids: Tensor | None) -> None:
    wanted = kept(LENGTHS, kv_lengths, dropout_ids=ids, backend="reference")
    found = kept(LENGTHS, kv_lengths, dropout_ids=ids, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("backend", ["reference", "tiled", "segments", "cpp"])
def test_packing_does_not_matter(backend: str) -> None:
    """The same weights are dropped in a batch in another order, alone, padded, and of fixed capacity."""
    wanted = kept(LENGTHS, dropout_ids=IDS, backend=backend)
    order = [4, 2, 0, 3, 1]
    shuffled = kept([LENGTHS[i] for i in order], dropout_ids=IDS[order], backend=backend)
    assert all(torch.equal(wanted[i], x) for i, x in zip(order, shuffled, strict=True))
    for i, n in enumerate(LENGTHS):
        (alone,) = kept([n], dropout_ids=IDS[i : i + 1], backend=backend)
        assert torch.equal(alone, wanted[i])
    longest = max(LENGTHS)
    mask = fj.Prefix(torch.tensor(LENGTHS))  # of the keys that are no padding
    padded = kept([longest] * len(LENGTHS), mask=mask, dropout_ids=IDS, backend=backend)
    assert all(torch.equal(x[:, :n, :n], w) for x, n, w in zip(padded, LENGTHS, wanted, strict=True))
    assert not torch.equal(wanted[0][:, :7, :7], wanted[2])


def test_fixed_capacity_does_not_matter() -> None:
    q, k, v = batch(LENGTHS)
    total = q.values.shape[0]
    spare = [fj.Jagged(torch.cat([x.values, torch.full_like(x.values[:9], torch.nan)]), x.offsets) for x in (q, k, v)]
    for backend in ("tiled", "segments", "reference"):
        plan = fj.plan(spare[0], mask=fj.Causal(), max_tokens=total + 9, max_length=40)
        out, lse = attend(*spare, plan=plan, dropout_ids=IDS, return_lse=True, backend=backend)
        wanted, sums = attend(q, k, v, mask=fj.Causal(), dropout_ids=IDS, return_lse=True, backend=backend)
        torch.testing.assert_close((out.values[:total], lse.values[:total]), (wanted.values, sums.values))
        assert not out.values[total:].any()
        grads = torch.autograd.grad(out.values.sum(), [x.values for x in (q, k, v)])
        torch.testing.assert_close(grads, torch.autograd.grad(wanted.values.sum(), [x.values for x in (q, k, v)]))


@pytest.mark.slow
def test_flex_attention_drops_the_same_on_a_gpu() -> None:
    """Its CUDA kernels, which Triton's interpreter runs."""
    below = torch.tensor(-(2**30), dtype=torch.int32)
    score = fj.Alibi.from_heads(HEADS) >> Dropped(torch.tensor(-(2**62) - 7), below, HEADS, IDS)
    q, k = (jagged([40, 7, 0, 93, 2], heads, 16, dtype=torch.float32, seed=heads) for heads in (HEADS, GROUPS))
    v = k.with_values(k.values.flip(0))
    assert_kernels_match(fj.plan(q, mask=fj.Causal(), score=score), q, k, v)


def test_the_index_is_the_default_number_of_a_segment() -> None:
    x, y = kept(LENGTHS), kept(LENGTHS, dropout_ids=torch.arange(5, dtype=torch.int32))
    assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_rate_is_within_binomial_bounds(rate: float) -> None:
    """In all, and for each pair of neighbours: of keys, queries, heads, segments, and calls, which are independent."""
    calls = [kept([128] * 8, seed=seed, dropout=rate, backend="segments") for seed in range(2)]
    gone = ~torch.stack([torch.stack(x) for x in calls])  # [calls, S, H, n, m]

    def check(x: Tensor, p: float) -> None:
        assert abs(x.double().mean() - p) <= 5 * math.sqrt(p * (1 - p) / x.numel())

    check(gone, rate)
    for dim in range(5):
        half = gone.shape[dim] // 2
        a, b = gone.narrow(dim, 0, gone.shape[dim] - 1), gone.narrow(dim, 1, gone.shape[dim] - 1)
        check(a & b, rate**2)
        check(gone.narrow(dim, 0, half) & gone.narrow(dim, half, half), rate**2)
    for dim in (3, 4):  # by row and by column: the squared deviations of n binomials
        n = gone.numel() // gone.shape[dim]
        counts = gone.transpose(0, dim).flatten(1).double().sum(1)
        chi = ((counts - n * rate) ** 2 / (n * rate * (1 - rate))).sum()
        assert abs(chi - counts.numel()) <= 5 * math.sqrt(2 * counts.numel())


def test_the_mean_is_the_output_without_dropout() -> None:
    many = 2000
    one = [jagged([6], heads, n, seed=n) for heads, n in ((HEADS, DIM), (GROUPS, DIM), (GROUPS, VALUE))]
    q, k, v = (fj.Jagged.from_list(list(x.unbind()) * many) for x in one)
    for options in ({}, {"normalizer": fj.SiLU()}):
        out = torch.stack(attend(q, k, v, mask=fj.Causal(), backend="tiled", **options).unbind())
        wanted = fj.attention(*one, mask=fj.Causal(), **options).values
        error = (out.mean(0) - wanted).abs() / (out.std(0) / many**0.5 + 1e-12)
        assert error.max() < 5.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_by_finite_differences(backend: str) -> None:
    q, k, v = batch([5, 0, 3], [4, 2, 6])
    slopes, sinks = torch.randn(HEADS, dtype=torch.float64), torch.randn(HEADS, dtype=torch.float64)

    def fn(x: Tensor, y: Tensor, z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend(
            q.with_values(x), k.with_values(y), v.with_values(z), score=fj.Alibi(a), sinks=b,
            return_lse=True, backend=backend,
        )  # fmt: skip
        return out.values, lse.values

    given = [q.values, k.values, v.values, slopes.requires_grad_(), sinks.requires_grad_()]
    assert torch.autograd.gradcheck(fn, given, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_lose_all_weights_are_zero(backend: str) -> None:
    q, k, v = batch([2, 1, 3])
    out, lse = attend(q, k, v, dropout=1 - 2**-40, return_lse=True, backend=backend)
    assert not out.values.any()
    torch.testing.assert_close(lse.values, fj.attention(q, k, v, return_lse=True)[1].values)
    for grad in torch.autograd.grad(out.values.sum(), [x.values for x in (q, k, v)]):
        assert not grad.any()  # NaN counts


@pytest.mark.parametrize("backend", ["reference", "tiled", "segments"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, backend: str) -> None:
    q, k, v = batch([30, 7], dtype=dtype)
    given = [x.values for x in (q, k, v)]
    out = attend(q, k, v, mask=fj.Causal(), backend=backend).values
    assert out.dtype == dtype
    wide = [x.with_values(x.values.detach().double().requires_grad_()) for x in (q, k, v)]
    exact = attend(*wide, mask=fj.Causal(), backend="reference").values
    # Weights, values and results are rounded at most four times; values are at most about 4, weights 1 / 0.7.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=4 * unit, atol=8 * unit)
    found = torch.autograd.grad(out.float().sum(), given)
    wanted = torch.autograd.grad(exact.sum(), [x.values for x in wide])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=16 * unit, atol=64 * unit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_do_not_see_each_other(backend: str) -> None:
    q, k, v = batch([6, 3, 8])
    other = [x.with_values(torch.cat([x.values[:6], x.values[6:9] + 1, x.values[9:]])) for x in (q, k, v)]
    a, b = (attend(*x, backend=backend).values for x in ((q, k, v), other))
    assert torch.equal(a[:6], b[:6])
    assert torch.equal(a[9:], b[9:])


def test_each_call_draws_a_seed_and_a_rate_of_0_none() -> None:
    q, k, v = batch(LENGTHS)
    a = attend(q, k, v).values
    b = fj.attention(q, k, v, dropout=0.3).values
    assert not torch.equal(a, b)
    assert torch.equal(a, attend(q, k, v).values)
    state = torch.get_rng_state()
    assert torch.equal(fj.attention(q, k, v, dropout=0.0).values, fj.attention(q, k, v).values)
    assert torch.equal(state, torch.get_rng_state())


def test_a_generator_draws_the_seed() -> None:
    q, k, v = batch(LENGTHS)
    state = torch.get_rng_state()
    a, b = (
        fj.attention(q, k, v, dropout=0.3, generator=torch.Generator().manual_seed(4), backend=backend).values
        for backend in ("tiled", "reference")
    )
    torch.testing.assert_close(a, b)
    assert torch.equal(state, torch.get_rng_state())


def train(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged, ids: Tensor | None) -> Tensor:
    return fj.attention(q, k, v, mask=fj.Causal(), dropout=0.3, dropout_ids=ids).values


BATCHES = [[5, 9], [3, 0, 12], [2, 2, 2, 2]]


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("has_ids", [False, True], ids=["index", "ids"])
def test_one_graph_for_all_batches_which_drops_what_eager_mode_does(compiler: str, has_ids: bool) -> None:
    every = [*BATCHES, *([] if has_ids else [[20]]), BATCHES[0]]  # PyTorch specializes a tensor of one number
    batches = [(*batch(x), torch.arange(len(x)) * 3 if has_ids else None) for x in every]
    torch.manual_seed(7)
    wanted = [train(*x) for x in batches]
    assert not torch.equal(wanted[0], wanted[-1])
    grads = [torch.autograd.grad(x.sum(), y[0].values)[0] for x, y in zip(wanted, batches, strict=True)]
    grads[0] = grads[-1] = grads[0] + grads[-1]
    torch.manual_seed(7)
    batches[-1] = batches[0]
    graphs = assert_compiles(
        train, batches, backend=compiler, after_each=lambda i, out: torch.testing.assert_close(out, wanted[i])
    )
    assert graphs.forward == graphs.backward == [0]
    for x, grad in zip(batches, grads, strict=True):
        torch.testing.assert_close(x[0].values.grad, grad)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_calls_in_one_graph_draw_seeds_of_their_own(compiler: str) -> None:
    q, k, v = batch(LENGTHS)

    def fn(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged) -> tuple[Tensor, Tensor]:
        return train(q, k, v, None), train(q, k, v, None)

    torch.manual_seed(1)
    wanted = fn(q, k, v)
    torch._dynamo.reset()
    torch.manual_seed(1)
    found = torch.compile(fn, fullgraph=True, backend=compiler)(q, k, v)
    torch.testing.assert_close(found, wanted)
    assert not torch.equal(*found)
    given = [x.values for x in (q, k, v)]
    grads = [torch.autograd.grad((a * b).sum(), given) for a, b in (found, wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_checkpointing_drops_the_same(compiler: str | None) -> None:
    q, k, v = batch(LENGTHS)
    given = [x.values for x in (q, k, v)]

    def layer(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return train(q.with_values(x), k.with_values(y), v.with_values(z), IDS).square()

    def stack(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        for _ in range(2):
            x = x + checkpoint(layer, x, y, z, use_reentrant=False).sum()  # type: ignore[operator]
        return x

    torch.manual_seed(3)
    x = given[0]
    for _ in range(2):
        x = x + layer(x, *given[1:]).sum()
    wanted = torch.autograd.grad(x.sin().sum(), given)
    torch.manual_seed(3)
    torch._dynamo.reset()
    fn = stack if compiler is None else torch.compile(stack, fullgraph=True, backend=compiler)
    torch.testing.assert_close(torch.autograd.grad(fn(*given).sin().sum(), given), wanted)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rate of 1": ({"dropout": 1.0}, r"dropout: must be at least 0 and less than 1; got dropout=1\.0"),
    "negative": ({"dropout": -0.1}, "dropout: must be at least 0 and less than 1"),
    "nan": ({"dropout": float("nan")}, "dropout: must be a finite number"),
    "bool": ({"dropout": True}, "dropout: must be a finite number; got dropout=True"),
    "tensor": ({"dropout": torch.tensor(0.5)}, "dropout: must be a number"),
    "ids": (
        {"dropout_ids": torch.zeros(3, dtype=torch.int64)},
        r"dropout_ids: .*one per segment.*shape=.3,.*segments=2",
    ),
    "floats": ({"dropout_ids": torch.zeros(2)}, r"dropout_ids: must be integers \[S\].*float32"),
    "list": ({"dropout_ids": [0, 1]}, "dropout_ids: must be integers"),
    "meta": ({"dropout_ids": torch.zeros(2, dtype=torch.int64, device="meta")}, "dropout_ids: .*q's device"),
    "generator": ({"generator": 3}, "generator: must be a torch.Generator of q's device; got generator='3'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ShapeError, match=message):
        fj.attention(*batch([3, 2]), **{"dropout": 0.1, **options})


def test_stick_breaking_and_generators_in_graphs_are_refused() -> None:
    given = batch([3, 2])
    with pytest.raises(PlanError, match=r"dropout: is for a softmax and pointwise normalizers.*StickBreaking"):
        fj.attention(*given, mask=fj.Causal(), normalizer=fj.StickBreaking(), dropout=0.1)
    with pytest.raises(BackendError, match="only adds a bias"):
        fj.attention(*given, score=fj.SoftCap(2.0), dropout=0.1, backend="segments")

    def fn(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged, generator: torch.Generator) -> Tensor:
        return fj.attention(q, k, v, dropout=0.1, generator=generator).values

    torch._dynamo.reset()
    with pytest.raises(Exception, match="generator: cannot be read in a traced graph"):
        torch.compile(fn, fullgraph=True, backend="eager")(*given, torch.Generator())
