"""Score nodes: order of composition, tables, and what each does to a score."""

from __future__ import annotations

import math

import pytest
import torch
from cases import make_qkv

import flexjag as fj
from flexjag import Alibi, RelativeBias, ScoreMod, SoftCap
from flexjag.algebra import scores as s
from flexjag.errors import ScoreError


def add_one(score, b, h, q, kv):  # type: ignore[no-untyped-def]
    return score + 1.0


def times_two(score, b, h, q, kv):  # type: ignore[no-untyped-def]
    return score * 2.0


def scores_of(score: fj.Score, lengths: list[int], heads: int = 2, backend: str = "reference") -> torch.Tensor:
    """The modified scores of zero queries, ``[H, T, T]``: with v = I the output is the weights, which lse undoes."""
    total = sum(lengths)
    q = fj.Jagged.from_lengths(torch.zeros(total, heads, 1, dtype=torch.float64), lengths)
    basis = torch.eye(total, dtype=torch.float64)[:, None].expand(total, heads, total)
    weights, lse = fj.attention(q, q, q.with_values(basis), score=score, return_lse=True, backend=backend)
    return (weights.values.log() + lse.values[..., None]).transpose(0, 1)


def test_chain_flattens_in_order() -> None:
    a, b, c = SoftCap(2.0), ScoreMod(add_one), SoftCap(3.0)
    assert s.parts(a >> b >> c) == [a, b, c]
    assert s.parts(a >> (b >> c)) == [a, b, c]
    assert s.parts(None) == []
    assert repr(a >> b >> c) == "SoftCap(2.0) >> ScoreMod(add_one) >> SoftCap(3.0)"


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (ScoreMod(add_one) >> ScoreMod(times_two), 2.0),
        (ScoreMod(times_two) >> ScoreMod(add_one), 1.0),
        (ScoreMod(add_one) >> SoftCap(2.0), 2.0 * math.tanh(0.5)),
        (SoftCap(2.0) >> ScoreMod(add_one), 1.0),
    ],
    ids=["add>>times", "times>>add", "add>>cap", "cap>>add"],
)
def test_left_to_right(score: fj.Score, expected: float, backend: str) -> None:
    got = scores_of(score, [3], backend=backend)
    # rounding of exp, log and a sum of three in float64
    torch.testing.assert_close(got, torch.full_like(got, expected), rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", ["reference", "tiled", "segments"])
def test_alibi_by_hand(backend: str) -> None:
    got = scores_of(Alibi(torch.tensor([0.5, 2.0])), [2, 3], backend=backend)
    at = torch.arange(3.0, dtype=torch.float64)
    distance = at[None] - at[:, None]
    for h, slope in enumerate((0.5, 2.0)):
        torch.testing.assert_close(got[h, 2:, 2:], slope * distance, rtol=0, atol=1e-14)
        torch.testing.assert_close(got[h, :2, :2], slope * distance[:2, :2], rtol=0, atol=1e-14)
    assert (got[:, 2:, :2] == -math.inf).all()


@pytest.mark.parametrize("backend", ["reference", "tiled", "segments"])
def test_relative_bias_by_hand(backend: str) -> None:
    """Distances are clipped to R = 1: the table is [before, self, after]."""
    table = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 4.0]], dtype=torch.float64)
    got = scores_of(RelativeBias(table), [1, 4], backend=backend)
    index = torch.tensor([[1, 2, 2, 2], [0, 1, 2, 2], [0, 0, 1, 2], [0, 0, 0, 1]])
    torch.testing.assert_close(got[:, 1:, 1:], table[:, index], rtol=0, atol=1e-14)
    torch.testing.assert_close(got[:, 0, 0], table[:, 1], rtol=0, atol=1e-14)


def test_score_mod_sees_the_segment_and_local_positions() -> None:
    def coordinates(score, b, h, q, kv):  # type: ignore[no-untyped-def]
        return score + 1000.0 * b + 100.0 * h + 10.0 * q + 1.0 * kv

    for backend in ("reference", "tiled"):
        got = scores_of(ScoreMod(coordinates), [2, 3], backend=backend)
        assert got[1, 3, 4].item() == pytest.approx(1000 + 100 + 10 * 1 + 2, abs=1e-9)  # exp and log of about 1e3
        assert got[0, 1, 0].item() == pytest.approx(10, abs=1e-9)


def test_alibi_slopes_are_the_papers() -> None:
    assert Alibi.from_heads(8).slopes.tolist() == [2.0**-i for i in range(1, 9)]


def test_is_additive() -> None:
    alibi, table = Alibi.from_heads(2), RelativeBias(torch.zeros(2, 3))
    assert s.is_additive(None)
    assert s.is_additive(alibi >> table)
    assert not s.is_additive(alibi >> SoftCap(2.0))
    assert not s.is_additive(ScoreMod(add_one))


def test_heads_of_tables() -> None:
    assert s.num_score_heads(SoftCap(1.0)) is None
    assert s.num_score_heads(SoftCap(1.0) >> Alibi.from_heads(3)) == 3
    with pytest.raises(ScoreError, match=r"score: every table must have one row per query head; got heads=\[2, 3\]"):
        s.num_score_heads(Alibi.from_heads(3) >> RelativeBias(torch.zeros(2, 3)))


def test_equality() -> None:
    assert SoftCap(2.0) == SoftCap(2.0)
    assert SoftCap(2.0) != SoftCap(3.0)
    assert Alibi.from_heads(2) != Alibi.from_heads(2)  # tensors compare by identity
    assert fj.Softmax() == fj.Softmax()


BAD = [
    (lambda: SoftCap(0.0), r"cap: must be a positive number; got cap=0.0"),
    (lambda: SoftCap(-1), r"cap: must be a positive number; got cap=-1"),
    (lambda: Alibi(torch.zeros(2, 2)), r"slopes: must be a 1-D float tensor \[H\]; got shape=\(2, 2\)"),
    (lambda: Alibi(torch.zeros(2, dtype=torch.int64)), r"slopes: must be a 1-D float tensor.*dtype=torch.int64"),
    (lambda: RelativeBias(torch.zeros(2, 4)), r"table: must be float \[H, 2R \+ 1\], an odd width; got shape=\(2, 4\)"),
    (lambda: ScoreMod(3), r"fn: must be callable as fn\(score, b, h, q_pos, kv_pos\); got fn=3"),
    (lambda: SoftCap(1.0) >> fj.Causal(), r"score: both sides of >> must be scores; got other='Causal'"),
    (lambda: SoftCap(1.0) >> add_one, r"score: both sides of >> must be scores; got other='function'"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_malformed_scores_raise(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ScoreError, match=message):
        make()


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("alibi", "tiled"), ("alibi", "segments"), ("table", "tiled"), ("table", "segments"), ("closure", "tiled")],
)
def test_learned_tensors_get_gradients(kind: str, backend: str) -> None:
    q, k, v = make_qkv([5, 0, 18])
    weight = torch.linspace(-1, 1, {"alibi": 2, "table": 2 * 7, "closure": 2}[kind], dtype=torch.float64)

    def loss(weight: torch.Tensor, backend: str) -> torch.Tensor:
        score: fj.Score = {
            "alibi": lambda: Alibi(weight),
            "table": lambda: RelativeBias(weight.view(2, 7)),
            "closure": lambda: ScoreMod(lambda x, b, h, q, kv: x * weight[h] + q * weight[0]),
        }[kind]()
        return (fj.attention(q, k, v, mask=fj.Causal(), score=score, backend=backend).values ** 2).sum()

    got, expected = (
        torch.autograd.grad(loss(w, name), w)[0]
        for name in (backend, "reference")
        for w in [weight.clone().requires_grad_()]
    )
    assert expected.abs().max() > 1e-3
    # float64, sums over at most 23 * 23 * 2 scores
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
