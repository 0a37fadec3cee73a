"""Mods: FlexAttention's signature on packed indices, in interval form."""

from __future__ import annotations

import pytest
import torch
from cases import jagged

import flexjag as fj
from flexjag import (
    Alibi,
    Causal,
    Chunked,
    Dense,
    Full,
    MaskMod,
    PerHead,
    Prefix,
    RelativeBias,
    SameGroup,
    SoftCap,
    Window,
)
from flexjag.algebra import user_functions as functions
from flexjag.algebra.scores import parts
from flexjag.errors import MaskError, ShapeError
from flexjag.extend import Mask, Sandwich, Spans, along, dense, mask_case, node, sandwich
from flexjag.lowering import mods
from flexjag.testing import assert_matches_reference, assert_tiles

LENGTHS = [3, 0, 4]
TOTAL = sum(LENGTHS)
SEGMENT = torch.tensor([0, 0, 0, 2, 2, 2, 2])
POS = torch.tensor([0, 1, 2, 0, 1, 2, 3])
SAME = SEGMENT[:, None] == SEGMENT[None]
QI, KJ = POS[:, None], POS[None]
MATRIX = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1]]).bool()
BIG = torch.zeros(4, 4, dtype=torch.bool)
BIG[:3, :3] = MATRIX
IDS = torch.tensor([4, 5, 4, 4, 4, 5, 5])

MASKS = [
    (Full(), SAME),
    (Causal() & Window(1, 0), SAME & (KJ <= QI) & (QI - 1 <= KJ)),
    (~Causal() | Prefix(1), SAME & ((KJ > QI) | (KJ < 1))),
    (MaskMod(lambda b, h, q, kv: (q + kv + b) % 2 == 0), SAME & ((QI + KJ + SEGMENT[:, None]) % 2 == 0)),
    (SameGroup(IDS), SAME & (IDS[:, None] == IDS[None])),
    (Dense(MATRIX), SAME & BIG[QI, KJ]),
    (Dense.from_list([MATRIX, torch.zeros(0, 0).bool(), BIG]), SAME & BIG[QI, KJ]),
    (~SameGroup(IDS) & ~Dense(MATRIX), SAME & (IDS[:, None] != IDS[None]) & ~BIG[QI, KJ]),
]


def evaluate(mod, heads: int = 1) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The mod one scalar at a time, as FlexAttention defines it."""
    h, q, kv = (torch.arange(n, dtype=torch.int32) for n in (heads, TOTAL, TOTAL))
    zero = torch.zeros((), dtype=torch.int32)
    return torch.stack([torch.stack([torch.stack([mod(zero, a, b, c) for c in kv]) for b in q]) for a in h])


@pytest.mark.parametrize(("mask", "expected"), MASKS, ids=[repr(x).replace("<lambda>", "fn") for x, _ in MASKS])
def test_mask_mod_on_scalars_and_on_tensors(mask: fj.Mask, expected: torch.Tensor) -> None:
    plan = fj.plan(jagged(LENGTHS), mask=mask)
    assert torch.equal(evaluate(plan.mask_mod)[0], expected)
    assert torch.equal(plan.to_dense(), expected)


def test_mask_mod_broadcasts_any_rank() -> None:
    mod = fj.plan(jagged(LENGTHS), mask=Causal() & MaskMod(lambda b, h, q, kv: (q + h) % 2 == kv % 2)).mask_mod
    h, q, kv = torch.arange(2)[:, None, None, None], torch.arange(TOTAL)[:, None, None], torch.arange(TOTAL)[None, None]
    got = mod(torch.zeros((), dtype=torch.int64), h, q, kv)
    assert got.shape == (2, TOTAL, 1, TOTAL)
    for head in range(2):
        expected = SAME & (KJ <= QI) & ((QI + head) % 2 == KJ % 2)
        assert torch.equal(got[head, :, 0], expected)


def test_mask_mod_vmaps() -> None:
    """create_block_mask and flex_attention call it under vmap."""
    mod = fj.plan(jagged(LENGTHS), mask=MASKS[3][0] | Dense(MATRIX)).mask_mod
    dense = torch.vmap(torch.vmap(mod, (None, None, None, 0)), (None, None, 0, None))
    zero = torch.zeros((), dtype=torch.int64)
    got = dense(zero, zero, torch.arange(TOTAL), torch.arange(TOTAL))
    assert torch.equal(got, MASKS[3][1] | MASKS[5][1])


INTERVALS = [Full(), Causal("end"), Window(2, 1), Prefix(torch.tensor([1, 2, 3])), Chunked(2), ~(Causal() | Prefix(1))]


@pytest.mark.parametrize("mask", INTERVALS, ids=repr)
def test_interval_form_never_looks_anything_up_by_key(mask: fj.Mask) -> None:
    """A key far past the end would be out of bounds in any table."""
    mod = fj.plan(jagged(LENGTHS), mask=mask).mask_mod
    zero = torch.zeros((), dtype=torch.int64)
    assert not mod(zero, zero, torch.arange(TOTAL)[:, None], torch.tensor([[TOTAL, 10**9]])).any()


def test_user_functions_never_see_positions_outside_the_segment() -> None:
    """Tiles straddle segments, so keys of others are asked about; a lookup by position must stay in bounds."""
    table = torch.ones(4, 4, dtype=torch.bool)  # no segment is longer
    score_table = torch.zeros(4, 4, dtype=torch.float64)
    plan = fj.plan(
        jagged(LENGTHS),
        mask=MaskMod(lambda b, h, q, kv: table[q, kv]),
        score=fj.ScoreMod(lambda x, b, h, q, kv: x + score_table[q, kv]),
    )
    assert torch.equal(plan.to_dense(), SAME)
    zero = torch.zeros((), dtype=torch.int64)
    assert plan.score_mod is not None
    q, kv = torch.arange(TOTAL)[:, None], torch.arange(TOTAL)[None]
    assert not plan.score_mod(torch.zeros(TOTAL, TOTAL, dtype=torch.float64), zero, zero, q, kv).any()


def test_per_head() -> None:
    plan = fj.plan(jagged(LENGTHS), mask=PerHead([Causal(), Full(), Causal()]) & ~Prefix(1))
    assert plan.head_of is not None
    assert plan.head_of.tolist() == [0, 1, 0]
    assert len(plan.sandwiches) == 2  # equal heads share one
    causal, full = SAME & (KJ <= QI) & (KJ >= 1), SAME & (KJ >= 1)
    assert torch.equal(plan.to_dense(), torch.stack([causal, full, causal]))
    assert torch.equal(evaluate(plan.mask_mod, 3), plan.to_dense())


def test_score_mod_on_scalars() -> None:
    slopes, table = torch.tensor([0.5, 2.0]), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mod = fj.plan(jagged(LENGTHS), score=Alibi(slopes) >> RelativeBias(table) >> SoftCap(3.0)).score_mod
    assert mod is not None
    x, zero, h = torch.tensor(0.25), torch.zeros((), dtype=torch.int32), torch.ones((), dtype=torch.int32)
    q, kv = torch.tensor(5, dtype=torch.int32), torch.tensor(3, dtype=torch.int32)  # positions 2 and 0 of segment 2
    expected = 3.0 * torch.tanh(torch.tensor((0.25 + 2.0 * -2 + 4.0) / 3.0))
    assert mod(x, zero, h, q, kv).item() == pytest.approx(expected.item(), rel=1e-6)  # float32


def test_no_score_is_no_mod() -> None:
    assert fj.plan(jagged(LENGTHS)).score_mod is None


def test_packed_matrices_must_fill_the_segments() -> None:
    with pytest.raises(
        MaskError, match=r"values: packed matrices must have sum\(n_s \* m_s\) entries.*entries=9, needed=25"
    ):
        fj.plan(jagged(LENGTHS), mask=Dense.from_list([MATRIX])).mask_mod  # noqa: B018


PLACE = (torch.tensor(0), torch.tensor(0), torch.tensor(0), torch.tensor(0))


@node
class Reach(Mask):
    """A user's node: keys up to reach[h] back."""

    reach: torch.Tensor = along("query head")


@node
class Behind(Mask):
    """A user's node that is the same for all heads: keys at least n back."""

    n: int


@sandwich.register(Reach, Behind)
def _(mask, layout):  # type: ignore[no-untyped-def]
    start = layout.kv_start[None]
    return Sandwich(Spans(start, start), Spans(start, layout.kv_end[None]), mask)


@mask_case.register(Reach)
def _(mask, tables, layout):  # type: ignore[no-untyped-def]
    return lambda b, h, q, kv: (tables.shift[q] - kv).abs() <= mask.reach[h]


@mask_case.register(Behind)
def _(mask, tables, layout):  # type: ignore[no-untyped-def]
    return lambda b, h, q, kv: tables.shift[q] - kv >= mask.n


@dense.register(Reach)
def _(mask, segment):  # type: ignore[no-untyped-def]
    return (segment.i - segment.j).abs() <= mask.reach[:, None, None]


@dense.register(Behind)
def _(mask, segment):  # type: ignore[no-untyped-def]
    return segment.i - segment.j >= mask.n


@pytest.mark.parametrize(
    ("mask", "reads"),
    [
        (~(Causal() | MaskMod(lambda b, h, q, kv: (h == 0) & (q > kv))), True),
        (Causal() & MaskMod(lambda b, h, q, kv: q > kv + b), False),
        (PerHead([Causal(), Full()]), True),
        (Causal() & Reach(torch.tensor([1, 2])), True),
        (Causal() & Behind(2), False),
    ],
    ids=repr,
)
def test_reads_head(mask: fj.Mask, reads: bool) -> None:
    plan = fj.plan(jagged(LENGTHS), mask=mask)
    assert mods.reads_head(plan.mask_mod, plan.tables) is reads


def test_tiles_of_users_nodes_are_refined_unless_they_read_the_head() -> None:
    x = jagged([64], 2, 16)
    assert assert_tiles(Behind(17), x).num_full == fj.plan(x, mask=~fj.Window(16, None), block_size=16).num_full == 3
    assert assert_tiles(Reach(torch.tensor([64, 1])), x).num_full == 0


@pytest.mark.parametrize("heads", [2, 4])
def test_a_mask_per_head_is_for_that_many_heads(heads: int) -> None:
    """One head too many was silently ignored."""
    x = jagged([9], 3, 16)
    with pytest.raises(ShapeError, match=f"must be made for q's heads; got made_for={heads}, heads=3"):
        fj.attention(x, x, x, mask=Causal() & Reach(torch.ones(heads, dtype=torch.int64)))
    with pytest.raises(MaskError, match="one mask per head; got heads="):
        fj.plan(x, mask=PerHead([Full()] * 3) & Reach(torch.ones(heads, dtype=torch.int64)))


def test_a_mask_per_head_equals_the_reference() -> None:
    x = jagged(LENGTHS, 3, 16)
    assert_matches_reference(x, x, x, mask=Causal() & Reach(torch.tensor([0, 1, 5])), backend="tiled")


def test_learned_tensors_finds_closures() -> None:
    weight, other = torch.ones(2, requires_grad=True), torch.ones(2)
    score = fj.ScoreMod(lambda x, b, h, q, kv: x * weight[h] + other[h]) >> Alibi(torch.ones(2, requires_grad=True))
    found = functions.learned_tensors(score, torch.float32, lambda: PLACE)
    assert {id(x) for x in found} == {id(weight), id(parts(score)[1].slopes)}  # type: ignore[attr-defined]
    with torch.no_grad():
        assert functions.learned_tensors(score, torch.float32, lambda: PLACE) == []
