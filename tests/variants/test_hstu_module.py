"""HSTU layers as modules: isolated, compiled, saved, dropped out, misused."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from cases import jagged
from hstu_cases import DIM, HEADS, LAYERS, WIDTH, clock, close, make_layer, make_stack
from torch import Tensor

import flexjag as fj
from flexjag.algebra.normalizers import SiLU
from flexjag.errors import LayoutError, MaskError, PlanError, ScoreError, ShapeError
from flexjag.ops.select import jagged_concat
from flexjag.testing import assert_compiles, assert_no_leak
from flexjag.variants import HSTU, HSTUBias, HSTULayer, KVCache, hstu_mask, next_times


def test_no_segment_leaks() -> None:
    sizes = [20, 0, 7, 33, 1]
    x, times = jagged(sizes, WIDTH, dtype=torch.float32), clock(sizes)
    stack = make_stack(torch.float32)
    plan = fj.plan(x, mask=hstu_mask(x, contextual=2), normalizer=SiLU(0.1))
    with torch.no_grad():
        assert_no_leak(lambda q, k, v: stack(q, plan, times=times), x, x, x)


def test_gradients_are_the_same_every_time() -> None:
    """On two threads, where plain indexing adds with atomics."""
    sizes = [300, 200, 7]
    x, times = jagged(sizes, WIDTH, dtype=torch.float32), clock(sizes)
    stack = make_stack(torch.float32)
    plan = fj.plan(x, mask=hstu_mask(x), normalizer=SiLU(0.1))
    threads = torch.get_num_threads()

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad((stack(x, plan, times=times).values ** 2).sum(), list(stack.parameters()))

    torch.set_num_threads(2)
    try:
        first = run()
        assert all(torch.equal(a, b) for _ in range(4) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


def batches(count: int = 8) -> list[tuple[fj.Jagged, fj.Jagged, fj.Jagged]]:
    """Tokens, times and numbers of targets; S from 1 to 5, with empty segments."""
    g = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        sizes = torch.randint(0, 60, (1 + (index + 1) % 5,), generator=g).tolist() + ([5] if index % 2 else [])
        x = jagged(sizes, WIDTH, seed=index)
        targets = torch.tensor([min(n, index % 4) for n in sizes])
        found.append((x, clock(sizes, index), fj.Jagged(targets, torch.tensor([0, len(sizes)]))))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("plan_outside", [True, False], ids=["plan outside", "plan inside"])
def test_one_graph_for_all_batches(plan_outside: bool) -> None:
    """Two layers and their backward, with other lengths, times and targets each time; S = 1 at batch 4."""
    stack = make_stack()

    def plan(x: fj.Jagged, targets: fj.Jagged) -> fj.Plan:
        mask = hstu_mask(x, contextual=3, targets=targets.values, max_attn_len=20, min_full=5)
        return fj.plan(x, mask=mask, normalizer=SiLU(1 / 8), block_size=32)

    def run(x: fj.Jagged, times: fj.Jagged, targets: fj.Jagged, made: fj.Plan | None) -> Tensor:
        made = plan(x, targets) if made is None else made
        return stack(x, made, times=next_times(times), kv_times=times).values

    given = [(x, times, t, plan(x, t) if plan_outside else None) for x, times, t in batches()]

    def same(index: int, out: Tensor) -> None:
        found = [p.grad for p in stack.parameters()]
        stack.zero_grad()
        eager = run(*given[index])
        close(out, eager)
        for a, b in zip(found, torch.autograd.grad(eager.sum(), list(stack.parameters())), strict=True):
            assert a is not None
            close(a, b)

    expected = [0] if plan_outside else [0, 4]  # a tensor [S] in the graph is specialised by PyTorch at S = 1
    graphs = assert_compiles(run, given, max_graphs=len(expected), after_each=same)
    assert graphs.forward == graphs.backward == expected


def test_one_graph_with_every_option() -> None:
    """Of the mask and of layers. S = 1 is left out, which PyTorch would specialise."""
    layers = HSTU(make_layer(**chosen) for chosen in LAYERS[2:4])

    def run(x: fj.Jagged, targets: fj.Jagged) -> Tensor:
        options = {"causal": False, "target_group_size": 2, "max_attn_len": 20, "min_full": 5}
        mask = hstu_mask(x, contextual=targets.values // 2, targets=targets.values, **options)
        return layers(x, fj.plan(x, mask=mask, normalizer=SiLU(1 / 8), block_size=32)).values

    for layer in layers.layers:
        layer.bias = None
    given = [(x, targets) for x, _, targets in batches() if x.num_segments > 1]

    def same(index: int, out: Tensor) -> None:
        found = [p.grad for p in layers.parameters()]
        layers.zero_grad()
        eager = run(*given[index])
        close(out, eager)
        for a, b in zip(found, torch.autograd.grad(eager.sum(), list(layers.parameters())), strict=True):
            assert a is not None
            close(a, b)

    graphs = assert_compiles(run, given, backend="aot_eager", after_each=same)
    assert graphs.forward == graphs.backward == [0]


@pytest.mark.slow
def test_one_graph_for_all_decode_steps() -> None:
    stack = make_stack()

    def step(new: fj.Jagged, caches: list[KVCache], now: fj.Jagged, times: fj.Jagged) -> tuple:
        plan = fj.plan(new, times, mask=hstu_mask(new, times), normalizer=SiLU(1 / 8))
        return stack.decode(new, caches, plan, times=now, kv_times=times)

    given = []
    with torch.no_grad():
        for index, (x, times, _) in enumerate(batches(6)):
            _, caches = stack.decode(x, None, fj.plan(x, mask=hstu_mask(x), normalizer=SiLU(1 / 8)), times=times)
            counts = [2 + s % 3 for s in range(x.num_segments)]
            new, now = jagged(counts, WIDTH, seed=9), clock(counts, index)
            given.append((new, caches, now, jagged_concat([times, now])))

    def same(index: int, out: tuple) -> None:
        with torch.no_grad():
            eager = step(*given[index])
        close(out[0].values, eager[0].values)
        for a, b in zip(out[1], eager[1], strict=True):
            close(a.k.values, b.k.values)
            close(a.v.values, b.v.values)

    graphs = assert_compiles(step, given, backward=False, after_each=same)
    assert graphs.inference == [0]


def test_state_survives_a_round_trip() -> None:
    sizes = [9, 4]
    x, times = jagged(sizes, WIDTH), clock(sizes)
    plan = fj.plan(x, mask=hstu_mask(x), normalizer=SiLU())
    stack, other = make_stack(), make_stack()
    assert not torch.equal(stack(x, plan, times=times).values, other(x, plan, times=times).values)
    other.load_state_dict(stack.state_dict())
    assert torch.equal(stack(x, plan, times=times).values, other(x, plan, times=times).values)
    assert not any("boundaries" in name for name in stack.state_dict())  # they are no weights


def test_a_module_made_without_memory_is_reset_whole() -> None:
    """On "meta", as big models are made; the buckets come back too."""
    bias = HSTUBias(HEADS, max_distance=3, time_buckets=12, device="meta")
    layer = HSTULayer(WIDTH, HEADS, DIM, bias=bias, device="meta", dtype=torch.float64)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu").reset_parameters()
    assert bias.boundaries is not None
    assert torch.equal(bias.boundaries, fj.TimeBias.log_boundaries(12))
    assert layer.projection.weight.dtype == torch.float64
    reach = math.sqrt(6 / (WIDTH + 4 * HEADS * DIM))  # Glorot and Bengio's bound
    assert 0.9 * reach < float(layer.projection.weight.detach().abs().max()) <= reach
    assert all(torch.equal(layer.state_dict()[name], torch.zeros_like(layer.state_dict()[name]))
               for name in ("projection.bias", "output.bias", "input_norm.bias", "attention_norm.bias"))  # fmt: skip
    assert bias.position is not None
    assert 0 < float(bias.position.detach().abs().max()) < 0.02 * 6


def test_dropout_is_on_what_the_output_projects() -> None:
    x = jagged([400], WIDTH)
    plan = fj.plan(x, mask=hstu_mask(x), normalizer=SiLU())
    layer = make_layer(dropout=0.25)
    layer.bias = None
    kept: list[Tensor] = []
    layer.output.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    whole = layer.eval()(x, plan).values
    assert torch.equal(whole, layer(x, plan).values)
    out = layer.train()(x, plan).values
    gated, dropped = kept[0], kept[2]
    lost = dropped == 0
    torch.testing.assert_close(dropped[~lost], gated[~lost] / 0.75)
    n, share = lost.numel(), float(lost.double().mean())
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)  # five standard deviations
    assert torch.equal(out, x.values + layer.output(dropped))  # the residual is whole


def test_dropout_of_attention_weights_is_for_training_only() -> None:
    x = jagged([40, 7], WIDTH)
    plan = fj.plan(x, mask=hstu_mask(x), normalizer=SiLU())
    layer = make_layer(attention_dropout=0.25)
    layer.bias = None
    layer.eval()
    assert torch.equal(layer(x, plan).values, layer(x, plan).values)
    layer.train()
    assert not torch.equal(layer(x, plan).values, layer(x, plan).values)
    assert "attention_dropout=0.25" in repr(layer)


def test_what_modules_say_of_themselves() -> None:
    bias = HSTUBias(2, time_buckets=8)
    layer = HSTULayer(32, 2, 16, 8, scale=0.5, bias=bias)
    assert "width=32, heads=2, dim=16, value_dim=8, scale=0.5" in repr(layer)
    assert "HSTUBias(heads=2, time_buckets=8)" in repr(HSTU([layer]))
    layer = HSTULayer(32, 2, 16, silu="u", concat_u=True, group_norm=True)
    assert "value_dim=16, silu='u', concat_u=True, group_norm=True" in repr(layer)


X = jagged([3, 0, 4], WIDTH)
PLAN = fj.plan(X, mask=hstu_mask(X), normalizer=SiLU())
PLAIN = HSTULayer(WIDTH, HEADS, DIM, dtype=torch.float64)
TIMED = HSTULayer(WIDTH, HEADS, DIM, bias=HSTUBias(HEADS, time_buckets=4, dtype=torch.float64), dtype=torch.float64)
CACHE = KVCache(jagged([3, 0, 4], HEADS, DIM), jagged([3, 0, 4], HEADS, DIM))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: HSTULayer(0, 2, 8), ShapeError, r"width: must be an int of at least 1; got width=0"),
        (lambda: HSTULayer(8, 2, 8, -1), ShapeError, r"value_dim: must be an int"),
        (lambda: HSTULayer(8, 2, 8, attention_dropout=1.0), ShapeError, "attention_dropout: must be .* below 1"),
        (lambda: HSTULayer(8, 2, 8, dropout=1.5), ShapeError, r"dropout: must be a probability; got dropout=1.5"),
        (lambda: HSTULayer(8, 2, 8, bias=HSTUBias(3, max_distance=1)), ShapeError, r"bias: .*bias=3, heads=2"),
        (lambda: HSTULayer(8, 2, 8, silu="v"), ShapeError, r"silu: must be 'uvqk' or 'u'; got silu='v'"),
        (
            lambda: HSTULayer(8, 2, 8, concat_ua=True, concat_x=True),
            ShapeError,
            r"concat_ua: goes without concat_u and concat_x; got concat_u=False, concat_x=True",
        ),
        (lambda: HSTUBias(2), ScoreError, r"max_distance, time_buckets: at least one"),
        (lambda: HSTUBias(2, max_distance=-1), ScoreError, r"max_distance: must be an int of at least 0"),
        (lambda: HSTUBias(0, max_distance=1), ScoreError, r"heads: must be an int of at least 1"),
        (lambda: HSTUBias(2, time_buckets=999), ScoreError, r"count: must be 0 to"),
        (lambda: HSTU([]), ShapeError, r"layers: must be at least one.*layers=0, widths=\[\]"),
        (lambda: HSTU([PLAIN, HSTULayer(8, 2, 8)]), ShapeError, r"widths=\[8, 12\]"),
        (lambda: PLAIN(X.values, PLAN), ShapeError, r"x: must be a flexjag.Jagged; got type='Tensor'"),
        (lambda: PLAIN(jagged([7], 5), PLAN), ShapeError, r"x: values must be \[T, width\] with width 12"),
        (lambda: PLAIN(X.to(torch.float32), PLAN), ShapeError, r"x: must have the dtype of the layer"),
        (lambda: PLAIN(X.to("meta"), PLAN), ShapeError, r"x: must be on the device of the layer"),
        (lambda: PLAIN(X, hstu_mask(X)), PlanError, r"plan: must come from flexjag.plan; got type='Rows'"),
        (lambda: PLAIN(X, fj.plan(X)), PlanError, r"normalizer: HSTU's is pointwise.*got normalizer=Softmax\(\)"),
        (lambda: PLAIN(jagged([7], WIDTH), PLAN), PlanError, r"plan: was made for another layout"),
        (lambda: PLAIN(X, PLAN, times=clock([3, 0, 4])), ScoreError, r"times: go with a bias by time"),
        (lambda: TIMED(X, PLAN), ScoreError, r"times: must be given for a bias by time"),
        (lambda: TIMED(X, PLAN, times=X.positions), LayoutError, r"times: must be a flexjag.Jagged"),
        (lambda: TIMED(X, PLAN, times=clock([4, 0, 3])), LayoutError, r"times: must have the offsets of the tokens"),
        (lambda: TIMED(X, PLAN, times=clock([3, 0, 4]), kv_times=clock([7])), LayoutError, r"kv_times: must have"),
        (lambda: PLAIN.decode(jagged([7], WIDTH), CACHE, PLAN), LayoutError, r"cache: must have as many segments"),
        (lambda: PLAIN.decode(X, KVCache(CACHE.k, X), PLAN), ShapeError, r"cache: v must be \[T, heads, dim\]"),
        (lambda: PLAIN.decode(X, CACHE, PLAN), PlanError, r"plan: was made for another layout"),
        (lambda: hstu_mask(X, clock([7])), MaskError, r"k: must have as many segments as q; got q=3, k=1"),
        (lambda: HSTU([PLAIN]).decode(X, [CACHE, CACHE], PLAN), ShapeError, r"caches: must be one per layer"),
    ],
)
def test_bad_input(make, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        make()


def test_the_page_runs() -> None:
    path = Path(__file__).parents[2] / "docs/hstu.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
    names: dict = {"__name__": "hstu"}
    exec(compile(code, "docs/hstu.md", "exec"), names)
    assert names["encoded"].lengths.tolist() == [3, 2, 4, 0]
    assert all(p.grad is not None for p in names["encoder"].parameters())
