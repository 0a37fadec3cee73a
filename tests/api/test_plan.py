"""Plan: what it reports, what it proves, what it refuses."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from cases import EDGE_LENGTHS, jagged, make_qkv

import flexjag as fj
from flexjag import Causal, Full, MaskMod, PerHead, Prefix, Window
from flexjag.errors import MaskError, PlanError, ScoreError, ShapeError
from flexjag.lowering.layout import cpu_stands_in_for_gpu
from flexjag.lowering.outline import for_gpu, outline, with_tiles
from flexjag.lowering.recipe import Recipe


def test_counts_by_hand() -> None:
    """One segment of three tiles, causal: 6 of 9 tiles, 3 of them FULL."""
    plan = fj.plan(jagged([48], 4, 8), mask=Causal(), block_size=16)
    assert (plan.num_tiles, plan.num_full, plan.grid) == (6, 3, (3, 3))
    assert plan.density == pytest.approx(6 / 9)
    assert plan.flops == 4 * 6 * 16 * 16 * 4 * 8


def test_nothing_to_do() -> None:
    for lengths in ([], [0, 0]):
        plan = fj.plan(jagged(lengths, 2, 8), mask=Causal())
        assert (plan.num_tiles, plan.num_full, plan.density, plan.flops) == (0, 0, 0.0, 0)
        assert plan.to_dense().shape == (0, 0)
    assert fj.plan(jagged([2, 0]), jagged([0, 3]), mask=Full()).num_tiles == 0


@pytest.mark.parametrize("lengths", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS.keys())
def test_density_is_the_share_of_tiles_with_an_allowed_pair(lengths: list[int]) -> None:
    plan = fj.plan(jagged(lengths), mask=Causal(), block_size=16)
    rows, cols = plan.grid
    dense = torch.nn.functional.pad(
        plan.to_dense(), (0, cols * 16 - plan.layout.num_kv, 0, rows * 16 - plan.layout.num_q)
    )
    live = dense.view(rows, 16, cols, 16).any(3).any(1)
    assert plan.num_tiles == int(live.sum())
    assert plan.density == pytest.approx(float(live.float().mean()))


def test_flops_need_heads() -> None:
    with pytest.raises(PlanError, match=r"q: FLOPs need a plan made from values of shape \[T, H, D\]"):
        fj.plan(jagged([48])).flops  # noqa: B018


def test_layout_alone_is_enough() -> None:
    """Token ids plan as well as projected heads do."""
    q, k, v = make_qkv([20, 5])
    plan = fj.plan(q.with_values(torch.arange(25)), mask=Causal(), block_size=16)
    out = fj.attention(q, k, v, plan=plan, backend="tiled")
    expected = fj.attention(q, k, v, mask=Causal(), backend="reference")
    torch.testing.assert_close(out.values, expected.values, rtol=1e-12, atol=1e-13)


EXACT = [
    (Causal() & Window(3, 0), True),
    (~(Causal() | Prefix(2)), True),
    (MaskMod(lambda b, h, q, kv: q == kv), False),
    (PerHead([Causal(), Full()]), True),
    (PerHead([Causal(), MaskMod(lambda b, h, q, kv: q == kv)]), False),
]


@pytest.mark.parametrize(("mask", "exact"), EXACT, ids=[repr(x) for x, _ in EXACT])
def test_exact(mask: fj.Mask, exact: bool) -> None:
    assert fj.plan(jagged([5])).exact
    assert fj.plan(jagged([5]), mask=mask).exact is exact


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_mask_is_flex_attentions() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = make_qkv([30, 0, 25], dtype=torch.float32)
    plan = fj.plan(q, mask=Causal() & Window(9, 0), score=fj.SoftCap(2.0), block_size=16)
    x, y, z = (t.values.transpose(0, 1)[None] for t in (q, k, v))
    out = flex_attention(x, y, z, score_mod=plan.score_mod, block_mask=plan.block_mask)
    expected = fj.attention(q, k, v, mask=plan.mask, score=plan.score, backend="reference").values
    assert plan.block_mask.shape == (1, 1, 55, 55)
    torch.testing.assert_close(out[0].transpose(0, 1), expected, rtol=1e-5, atol=1e-6)  # float32, 55 terms


def test_to_dense_of_heads() -> None:
    plan = fj.plan(jagged([3]), mask=PerHead([Causal(), Full()]))
    assert plan.to_dense().shape == (2, 3, 3)
    assert fj.plan(jagged([3]), mask=Causal()).to_dense(heads=4).shape == (4, 3, 3)


def test_repr() -> None:
    plan = fj.plan(jagged([3, 4]), jagged([1, 2]), mask=Causal(), score=fj.SoftCap(2.0), block_size=32)
    assert repr(plan) == "Plan(Causal(), score=SoftCap(2.0), segments=2, tokens=7x3, block_size=32)"


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        fj.plan(jagged([3])).block_size = 64  # type: ignore[misc]


def even(b, h, q, kv):  # type: ignore[no-untyped-def]
    return q % 2 == 0


BAD = [
    ({"mask": even}, MaskError, r"mask: must be a flexjag mask; wrap a function in MaskMod; got mask=<function even"),
    ({"mask": True}, MaskError, r"mask: must be a flexjag mask.*got mask=True"),
    ({"score": even}, ScoreError, r"score: must be a flexjag score; wrap a function in ScoreMod; got score=<function"),
    ({"normalizer": "softmax"}, PlanError, r"normalizer: must be a flexjag normalizer; got normalizer='softmax'"),
    ({"block_size": 100}, PlanError, r"block_size: must be a power of two of at least 16; got block_size=100"),
    ({"block_size": 8}, PlanError, r"block_size: must be a power of two of at least 16; got block_size=8"),
    ({"mask": torch.ones(9, 9)}, MaskError, r"mask: must be a flexjag mask; wrap a boolean matrix .* shape=\(9, 9\)$"),
    ({"mask": fj.Causal}, MaskError, r"mask: must be a flexjag mask, not its class; got mask='Causal'"),
    ({"max_length": 2}, PlanError, r"max_length: must bound every segment of q; got max_length=2, longest=\d"),
    ({"max_length": -1}, PlanError, r"max_length: must be an int of at least 0; got max_length=-1"),
    ({"max_tokens": 4}, PlanError, r"max_tokens: must equal the rows of q.values; got max_tokens=4, rows=5"),
    (
        {"mask": PerHead([Causal()] * 3), "score": fj.Alibi.from_heads(2)},
        ShapeError,
        r"mask, score: must agree on the number of heads; got heads=\[2, 3\]",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[x[2][:35] for x in BAD])
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fj.plan(jagged([2, 3]), **arguments)  # type: ignore[arg-type]


def test_planning_can_be_traced() -> None:
    """Traced, the number of tiles is a symbol, the tables hold every column and a row more; the tiles are the same."""

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def traced(x: fj.Jagged) -> tuple[torch.Tensor, ...]:
        plan = fj.plan(x, mask=Causal() & (Window(20, 0) | Prefix(2)), block_size=16)
        tiles = plan.tiles
        return (
            tiles.all_heads.row,
            tiles.all_heads.col,
            tiles.all_heads.full,
            tiles.kv_partial.count,
            tiles.q_full.count,
        )

    for lengths in ([40, 7, 33], [3, 90, 0, 17]):
        x = jagged(lengths)
        tiles = fj.plan(x, mask=Causal() & (Window(20, 0) | Prefix(2)), block_size=16).tiles
        row, col, full, kv_count, q_count = traced(x)
        assert torch.equal(torch.stack([row, col]), torch.stack([tiles.all_heads.row, tiles.all_heads.col]))
        assert torch.equal(full, tiles.all_heads.full)
        for spare, exact in ((kv_count, tiles.kv_partial.count), (q_count, tiles.q_full.count)):
            assert torch.equal(spare[:, :, :-1], exact)
            assert not spare[:, :, -1].any()


def test_with_score_shares_all_but_the_score() -> None:
    """One learned bias per layer, one plan per batch."""
    q = jagged([30, 0, 40], 2, 16)
    plan = fj.plan(q, mask=Causal())
    tables = [torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for table in tables:
        own = plan.with_score(fj.RelativeBias(table))
        assert own.tiles is plan.tiles
        assert own.layout is plan.layout
        for backend in ("tiled", "segments", "reference"):
            got = fj.attention(q, q, q, plan=own, backend=backend).values
            wanted = fj.attention(q, q, q, mask=Causal(), score=fj.RelativeBias(table), backend="reference").values
            torch.testing.assert_close(got, wanted)
            assert bool(torch.autograd.grad(got.sin().sum(), table)[0].any())
    assert plan.with_score(None).score is None
    with pytest.raises(fj.errors.ScoreError, match="score: must be a flexjag score"):
        plan.with_score(torch.ones(2))  # type: ignore[arg-type]
    per_head = fj.plan(q, mask=fj.PerHead([Causal(), fj.Full()]))
    with pytest.raises(fj.errors.ShapeError, match="must agree on the number of heads"):
        per_head.with_score(fj.Alibi.from_heads(4))
    with pytest.raises(fj.errors.ScoreError, match="times: must have one entry per query token"):
        plan.with_score(fj.TimeBias(torch.zeros(2, 2), torch.arange(3), torch.tensor([1])))


def test_a_plan_stays_a_plan_and_is_what_was_lowered() -> None:
    """What backends run is a recipe; the public face is kept by all that makes another one of it."""
    x, _, _ = make_qkv([40, 7])
    recipe = with_tiles(outline(Recipe, x, None, Causal(), None, None))
    plan = fj.plan(x, mask=Causal())
    assert type(recipe) is Recipe
    assert not hasattr(recipe, "explain")
    for one in (plan, plan.with_score(fj.SoftCap(2.0)), plan.learning_in(torch.float64), for_gpu(plan)):
        assert type(one) is fj.Plan
    assert recipe.num_tiles == plan.num_tiles
    assert [x.name for x in fields(fj.Plan)] == [x.name for x in fields(Recipe)]


def test_for_gpu_rounds_up_what_kernels_read() -> None:
    x, _, _ = make_qkv([40, 7])
    plan = fj.plan(x, mask=Causal(), block_size=32)
    made = for_gpu(plan)
    assert (plan.layout.on_gpu, made.layout.on_gpu) == (False, True)
    assert (plan.tables.q_pos.shape[0], made.tables.q_pos.shape[0]) == (47, 64)
    with cpu_stands_in_for_gpu():
        again = fj.plan(x, mask=Causal(), block_size=32)
    assert again.layout.on_gpu
    assert torch.equal(again.tables.q_pos, made.tables.q_pos)
    assert not fj.plan(x).layout.on_gpu
