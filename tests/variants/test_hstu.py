"""HSTU layers against a dense padded module, and decoded against themselves."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from cases import EDGE_LENGTHS, check_error, jagged
from hstu_cases import DIM, EPS, HEADS, LAYERS, WIDTH, Padded, allowed_pairs, clock, close, make_layer, make_stack
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import flexjag as fj
from flexjag.algebra.normalizers import SiLU
from flexjag.ops.select import jagged_concat, jagged_split
from flexjag.testing import lengths
from flexjag.variants import HSTUBias, HSTULayer, hstu_mask, next_times
from flexjag.variants.hstu.norm import HeadNorm, LayerNorm


def on(x: fj.Jagged, values: fj.Jagged) -> fj.Jagged:
    return x.with_values(values.values)


def both_ways(
    layer: HSTULayer, x: fj.Jagged, times: fj.Jagged, options: dict, scale: float
) -> tuple[Tensor, Tensor, Padded]:
    """The layer's output and the padded module's, for the same tokens."""
    plan = fj.plan(x, mask=hstu_mask(x, **options), normalizer=SiLU(scale), block_size=16)
    asked = next_times(times)
    out = layer(x, plan, times=asked, kv_times=times).values
    padded, most = Padded(layer), max([1, *x.lengths.tolist()])
    targets = options.get("targets")
    targets = torch.zeros_like(x.lengths) if targets is None else targets
    allowed = allowed_pairs(x.lengths, most, **{**options, "targets": targets})
    biases = padded.biases(asked.to_padded(max_length=most), times.to_padded(max_length=most))
    dense = padded(x.to_padded(max_length=most), allowed, scale, biases)
    return out, dense[torch.arange(most)[None] < x.lengths[:, None]], padded


def check_layer(sizes: list[int], with_targets: bool, options: dict, seed: int, **chosen: object) -> None:
    """Forward, and the gradients of the input and of every parameter."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.tensor([int(torch.randint(0, n + 1, (), generator=g)) for n in sizes], dtype=torch.int64)
    options["targets"] = targets if with_targets else None
    x = jagged(sizes, WIDTH)
    x.values.requires_grad_()
    layer = make_layer(**chosen)
    out, wanted, padded = both_ways(layer, x, clock(sizes), options, 1 / 8)
    found, expected = (
        torch.autograd.grad((o**2).sum(), [x.values, *module.parameters()], allow_unused=True, materialize_grads=True)
        for o, module in ((out, layer), (wanted, padded))
    )
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for a, b, name in zip((out, *found), (wanted, *expected), ("out", *names), strict=True):
        assert a.shape == b.shape, name
        if a.numel():
            close(a, b)


@given(
    sizes=lengths(max_total=80),
    options=st.fixed_dictionaries(
        {
            "contextual": st.integers(0, 4) | st.just("per segment"),
            "max_attn_len": st.none() | st.integers(0, 12),
            "min_full": st.integers(0, 5),
            "causal": st.booleans(),
            "target_group_size": st.integers(1, 3),
        }
    ),
    with_targets=st.booleans(),
    chosen=st.sampled_from(LAYERS),
    seed=st.integers(0, 99),
)
def test_a_layer_is_the_padded_one(
    sizes: list[int], options: dict, with_targets: bool, chosen: dict, seed: int
) -> None:
    if options["contextual"] == "per segment":
        options["contextual"] = torch.randint(0, 4, (len(sizes),), generator=torch.Generator().manual_seed(seed))
    check_layer(sizes, with_targets, options, seed, **chosen)


@pytest.mark.parametrize("sizes", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS)
def test_edges(sizes: list[int]) -> None:
    check_layer(sizes, True, {"contextual": 2, "max_attn_len": 7, "min_full": 3}, 0)


@pytest.mark.parametrize("chosen", LAYERS, ids=repr)
def test_options_of_a_layer(chosen: dict) -> None:
    """Each, with empty segments, and without a token; per segment another number of contextual tokens."""
    for sizes in ([9, 0, 21, 1], [0], []):
        options = {"contextual": torch.arange(len(sizes)), "max_attn_len": 0, "min_full": 0, "causal": False}
        check_layer(sizes, True, {**options, "target_group_size": 2}, 1, **chosen)


def test_one_token_of_one_feature() -> None:
    """Which PyTorch's group norm refuses: its norm is 0."""
    x = jagged([1], 4)
    layer = HSTULayer(4, 2, 3, 1, group_norm=True, dtype=torch.float64)
    nn.init.ones_(layer.output.weight)
    out = layer(x, fj.plan(x, mask=hstu_mask(x), normalizer=SiLU()))
    close(out.values, x.values)


def test_spare_rows_of_a_fixed_capacity_change_nothing() -> None:
    sizes, times, stack = [20, 0, 7], clock([20, 0, 7]), make_stack()
    x, more = jagged(sizes, WIDTH), jagged([5], WIDTH, seed=9)
    full = fj.Jagged(torch.cat([x.values, more.values]), x.offsets)
    clocks = fj.Jagged(torch.cat([times.values, torch.zeros(5, dtype=torch.int64)]), x.offsets)
    targets = torch.tensor([2, 0, 1])
    options = {"contextual": 2, "targets": targets, "max_attn_len": 5, "min_full": 2}
    plan = fj.plan(full, mask=hstu_mask(full, **options), normalizer=SiLU(0.1), max_tokens=32, max_length=20)
    got = stack(full, plan, times=next_times(clocks), kv_times=clocks).values
    plan = fj.plan(x, mask=hstu_mask(x, **options), normalizer=SiLU(0.1))
    close(got[:27], stack(x, plan, times=next_times(times), kv_times=times).values)
    assert got.isfinite().all()


@pytest.mark.parametrize("chosen", LAYERS, ids=repr)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast: bool, chosen: dict) -> None:
    """As close to float64 as the padded module in the same precision is, which rounds as often."""
    sizes, options = [30, 0, 17], {"contextual": 2, "max_attn_len": 9, "min_full": 3}
    exact = make_layer(**chosen)
    half = deepcopy(exact).to(torch.float32 if autocast else torch.bfloat16)
    x = jagged(sizes, WIDTH)
    with torch.no_grad():
        wanted = both_ways(exact, x, clock(sizes), options, 1 / 8)[0]
        x = x.to(half.output.weight.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, same, _ = both_ways(half, x, clock(sizes), options, 1 / 8)
    assert out.dtype == x.dtype
    if autocast:  # the residual is in float32, what is added to it in bfloat16
        out, same = ((t - x.values).bfloat16() for t in (out, same))
        wanted = wanted - x.values
    check_error(out, same, wanted, "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [lambda: LayerNorm(12), lambda: HeadNorm(3, EPS)], ids=["tokens", "heads"])
def test_norms_learn_in_half_precision(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """Gradients of gain and shift, sums over 3,000 tokens, are those of float64 but for one rounding."""
    x = jagged([3000], 12, dtype=dtype).values
    direction = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    norms = [make().to(t) for t in (dtype, torch.float64)]
    found = [
        torch.autograd.grad(norm(x.to(p.dtype)), list(norm.parameters()), direction.to(p.dtype))
        for norm in norms
        for p in list(norm.parameters())[:1]
    ]
    for got, wanted in zip(*found, strict=True):
        assert got.dtype == dtype
        # Half a unit of rounding; float32 sums add a thousandth of it.
        torch.testing.assert_close(got.double(), wanted, rtol=0.6 * torch.finfo(dtype).eps, atol=1e-2)


@pytest.mark.parametrize(
    "biases", [{}, {"max_distance": 5}, {"time_buckets": 9}, {"time_buckets": 3, "per_head": True}]
)
def test_a_layer_with_any_bias_is_attention_with_that_score(biases: dict) -> None:
    """The same steps by hand, with a score of the plan's own before the layer's."""
    sizes = [9, 0, 4]
    x, times = jagged(sizes, WIDTH), clock(sizes)
    bias = HSTUBias(HEADS, dtype=torch.float64, **biases) if biases else None
    layer = HSTULayer(WIDTH, HEADS, DIM, scale=0.3, bias=bias, dtype=torch.float64)
    given = {"times": times} if "time_buckets" in biases else {}
    plan = fj.plan(x, mask=fj.Causal(), score=fj.SoftCap(0.5), normalizer=SiLU())
    got = layer(x, plan, **given)
    parts = functional.silu(layer.projection(layer.input_norm(x.values))).chunk(4, 1)
    v, q, k = (x.with_values(t.unflatten(1, (HEADS, DIM))) for t in parts[1:])
    score: fj.Score = fj.SoftCap(0.5)
    if bias is not None:
        score = score >> bias(x, **given)
    out = fj.attention(q, k, v, mask=fj.Causal(), score=score, normalizer=SiLU(), scale=0.3, backend="reference")
    close(got.values, x.values + layer.output(layer.attention_norm(out.values.flatten(1)) * parts[0]))
    assert plan.score == fj.SoftCap(0.5)  # shared by layers, so left alone
    if bias is not None:
        table = bias.position if bias.time is None else bias.time
        assert table is not None
        assert table.shape[0] == (HEADS if "per_head" in biases else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_table_that_heads_share_learns_in_half_precision(dtype: torch.dtype) -> None:
    """The gradients of 16 heads are added up before they are rounded."""
    x, heads = jagged([300], 16, 8, dtype=dtype), 16
    bias = HSTUBias(heads, max_distance=2, dtype=dtype)
    exact = HSTUBias(heads, max_distance=2, dtype=torch.float64)
    exact.load_state_dict(bias.state_dict())
    found = []
    for own, batch in ((bias, x), (exact, x.to(torch.float64))):
        plan = fj.plan(batch, mask=fj.Causal(), score=own(batch), normalizer=SiLU(1 / 300))
        out = fj.attention(batch, batch, batch, plan=plan).values
        found += torch.autograd.grad((out.double() * x.values.double()).sum(), list(own.parameters()))
    got, wanted = found
    assert got.dtype == dtype
    # The output is rounded, too, but not its gradient: half a unit, and float32 sums of 16 * 300 products of about 1.
    error = 0.51 * torch.finfo(dtype).eps * wanted.abs() + 4800 * torch.finfo(torch.float32).eps
    assert bool(((got.double() - wanted).abs() <= error).all()), (got, wanted)


def test_next_times() -> None:
    times = fj.Jagged.from_lengths(torch.tensor([3, 5, 8, 1, 2, 2]), [0, 3, 1, 0, 2])
    assert next_times(times).values.tolist() == [5, 8, 8, 1, 2, 2]
    assert next_times(clock([])).values.tolist() == next_times(clock([0, 0])).values.tolist() == []
    spare = fj.Jagged(torch.tensor([3, 5, 8, 9]), torch.tensor([0, 2]))  # rows behind the last offset: anything
    assert next_times(spare).values[:2].tolist() == [5, 5]


def pieces(x: fj.Jagged, cuts: list[list[int]]) -> list[fj.Jagged]:
    """Each segment cut into consecutive pieces of the given lengths, one list of S lengths per cut but the last."""
    return list(jagged_split(x, [torch.tensor(n) for n in cuts]))


def test_decoding_in_steps_is_the_forward() -> None:
    """Four steps, with empty histories and steps without new tokens, through two layers."""
    sizes = [20, 0, 7, 33, 4]
    x, times = jagged(sizes, WIDTH), clock(sizes)
    stack = make_stack()
    options = {"max_attn_len": 8}
    whole = stack(x, fj.plan(x, mask=hstu_mask(x, **options), normalizer=SiLU(1 / 8)), times=times)
    cuts = [[12, 0, 0, 20, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]]
    caches, history, found = None, None, []
    for new, now in zip(pieces(x, cuts), pieces(times, cuts), strict=True):
        history = now if history is None else jagged_concat([history, now])
        plan = fj.plan(new, history, mask=hstu_mask(new, history, **options), normalizer=SiLU(1 / 8))
        out, caches = stack.decode(new, caches, plan, times=on(new, now), kv_times=history)
        found.append(out)
    close(jagged_concat(found).values, whole.values)
    assert all(torch.equal(part.offsets, x.offsets) for cache in caches for part in cache)


@pytest.mark.parametrize("sizes", [[20, 3, 0, 33], [0, 0], []], ids=str)
def test_candidates_are_scored_against_one_cache(sizes: list[int]) -> None:
    """Targets after a history with contextual tokens and rows that see all: the cache is as good for others."""
    x, times, stack = jagged(sizes, WIDTH), clock(sizes), make_stack(shared=True)
    options = {"contextual": torch.arange(len(sizes)), "max_attn_len": 5, "min_full": 3, "target_group_size": 2}
    plan = fj.plan(x, mask=hstu_mask(x, **options), normalizer=SiLU(0.2))
    out, caches = stack.decode(x, None, plan, times=times)
    close(out.values, stack(x, plan, times=times).values)
    for seed, counts in ((1, [2 - n % 2 for n in sizes]), (2, [n % 3 for n in sizes])):
        targets = torch.tensor(counts, dtype=torch.int64)
        new, now = jagged(counts, WIDTH, seed=seed), clock(counts, seed)
        both, moments = jagged_concat([x, new]), jagged_concat([times, now])
        cut = [torch.tensor(sizes, dtype=torch.int64)]
        mask = hstu_mask(both, targets=targets, **options)
        whole = stack(both, fj.plan(both, mask=mask, normalizer=SiLU(0.2)), times=on(both, moments))
        mask = hstu_mask(new, both, targets=targets, **options)
        plan = fj.plan(new, both, mask=mask, normalizer=SiLU(0.2))
        got, _ = stack.decode(new, caches, plan, times=on(new, now), kv_times=on(both, moments))
        if sum(counts):
            close(got.values, jagged_split(whole, cut)[1].values)


def test_a_decode_step_is_differentiable_in_its_cache() -> None:
    sizes, new_sizes = [9, 0, 5], [2, 1, 0]
    x, new, layer = jagged(sizes, WIDTH), jagged(new_sizes, WIDTH, seed=1), make_layer()
    layer.bias = None
    x.values.requires_grad_()
    both = jagged_concat([x, new])
    whole = layer(both, fj.plan(both, mask=hstu_mask(both), normalizer=SiLU()))
    wanted = jagged_split(whole, [x.lengths])[1].values
    _, cache = layer.decode(x, None, fj.plan(x, mask=hstu_mask(x), normalizer=SiLU()))
    got, _ = layer.decode(new, cache, fj.plan(new, both, mask=hstu_mask(new, both), normalizer=SiLU()))
    close(got.values, wanted)
    leaves = [x.values, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad((t**2).sum(), leaves) for t in (got.values, wanted)), strict=True):
        close(a, b)
