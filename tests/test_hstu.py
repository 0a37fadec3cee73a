"""HSTU layers against a dense padded module, and decoded against themselves."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from cases import EDGE_LENGTHS, check_error, jagged
from hstu_cases import DIM, HEADS, WIDTH, Padded, allowed_pairs, clock, close, make_layer, make_stack
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import flexjag as fj
from flexjag.normalizers import SiLU
from flexjag.ops.select import jagged_concat, jagged_split
from flexjag.testing import lengths
from flexjag.variants import HSTUBias, HSTULayer, hstu_mask, next_times


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
    allowed = allowed_pairs(
        x.lengths, most, options["contextual"], targets, options["max_attn_len"], options["min_full"]
    )
    biases = padded.biases(asked.to_padded(max_length=most), times.to_padded(max_length=most))
    dense = padded(x.to_padded(max_length=most), allowed, scale, biases)
    return out, dense[torch.arange(most)[None] < x.lengths[:, None]], padded


def check_layer(sizes: list[int], with_targets: bool, options: dict, seed: int) -> None:
    """Forward, and the gradients of the input and of every parameter."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.tensor([int(torch.randint(0, n + 1, (), generator=g)) for n in sizes], dtype=torch.int64)
    options["targets"] = targets if with_targets else None
    x = jagged(sizes, WIDTH)
    x.values.requires_grad_()
    layer = make_layer()
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
    contextual=st.integers(0, 4),
    with_targets=st.booleans(),
    max_attn_len=st.none() | st.integers(1, 12),
    min_full=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_a_layer_is_the_padded_one(
    sizes: list[int], contextual: int, with_targets: bool, max_attn_len: int | None, min_full: int, seed: int
) -> None:
    options = {"contextual": contextual, "max_attn_len": max_attn_len, "min_full": min_full}
    check_layer(sizes, with_targets, options, seed)


@pytest.mark.parametrize("sizes", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS)
def test_edges(sizes: list[int]) -> None:
    check_layer(sizes, True, {"contextual": 2, "max_attn_len": 7, "min_full": 3}, 0)


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


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast: bool) -> None:
    """As close to float64 as the padded module in the same precision is, which rounds as often."""
    sizes, options = [30, 0, 17], {"contextual": 2, "max_attn_len": 9, "min_full": 3}
    exact = make_layer()
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
    options = {"contextual": 2, "max_attn_len": 5, "min_full": 3}
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
