"""What a plan says of itself: what was assumed, who can run it, and numbers that people can read."""

from __future__ import annotations

import pytest
import torch
from cases import jagged

import flexjag as fj
from flexjag import Causal
from flexjag.api import explain

LEARNED = {
    "relative": lambda t: fj.RelativeBias(t),
    "alibi": lambda t: fj.Alibi(t[:, 0]),
    "composed": lambda t: fj.SoftCap(3.0) >> fj.RelativeBias(t),
    "function": lambda t: fj.ScoreMod(lambda s, b, h, i, j: s * t[h, 0]),
}


def lines(plan: fj.Plan) -> dict[str, str]:
    """The text by the word that begins each line; `also` and `not` are of the backends."""
    return {line[:10].strip(): line[10:] for line in plan.explain().splitlines()}


def test_a_plan_of_heads_says_which() -> None:
    x = jagged([30, 5], 4, 32, dtype=torch.float32)
    assert lines(fj.plan(x))["for"] == "4 heads of 32, float32, without gradients; as in the q planned for"
    one = fj.Jagged(torch.zeros(35, 1, 32, dtype=torch.bfloat16, requires_grad=True), x.offsets)
    assert lines(fj.plan(one))["for"] == "1 head of 32, bfloat16, with gradients; as in the q planned for"


def test_a_plan_of_token_ids_says_what_it_assumed() -> None:
    ids = fj.Jagged.from_lengths(torch.zeros(35, dtype=torch.long), [30, 5])
    text = lines(fj.plan(ids, mask=Causal()))
    assert text["for"] == (
        "1 head of 64, any dtype, without gradients; assumed: the plan was made from values without heads"
    )
    assert "compute" not in text
    found = explain.facts(fj.plan(ids))
    assert (found["heads"], found["head_dim"], found["dtype"], found["gradients"], found["assumed"]) == (
        1, 64, None, False, True,
    )  # fmt: skip


@pytest.mark.parametrize("make", LEARNED.values(), ids=LEARNED.keys())
@pytest.mark.parametrize("shape", [(), (2, 16)], ids=["ids", "heads"])
def test_a_trained_score_needs_a_backward(make, shape) -> None:  # type: ignore[no-untyped-def]
    """On a CPU `flex` has none, so it is not offered, whatever the plan was made from."""
    x = jagged([30, 5], *shape, dtype=torch.float32)
    for trained in (False, True):
        plan = fj.plan(x, mask=Causal(), score=make(torch.zeros(2, 5, requires_grad=trained)))
        text = lines(plan)
        assert ("with gradients" in text["for"]) == trained
        assert ("flex" in text["also"]) == (not trained)
        assert ("flex: it has no backward on CPU" in plan.explain()) == trained
        with torch.no_grad():
            assert "flex" in lines(plan)["also"]


def test_a_trained_normalizer_needs_a_backward() -> None:
    bias = torch.zeros(2, requires_grad=True)
    assert "with gradients" in lines(fj.plan(jagged([5]), normalizer=fj.Sigmoid(bias=bias)))["for"]


def test_what_a_graph_takes_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    """`segments` cannot be traced, and without a C++ compiler what can is usually slower on a CPU."""
    plan = fj.plan(jagged([300] * 3, 2, 16), mask=Causal())
    assert lines(plan)["compiled"] == "cpp, as torch.compile cannot trace segments"
    monkeypatch.setenv("FLEXJAG_CPP", "0")
    plan = fj.plan(jagged([300] * 3, 2, 16), mask=Causal())
    assert plan.backend == "segments"
    assert lines(plan)["compiled"].startswith(
        "tiled, as torch.compile cannot trace segments; on a CPU usually slower than eager: "
    )
    capped = fj.plan(jagged([300] * 3, 2, 16), score=fj.SoftCap(3.0))
    assert capped.backend == "tiled"
    assert "compiled" not in lines(capped)


def test_numbers_for_people() -> None:
    one = lines(fj.plan(jagged([1], 1, 16)))
    assert one["batch"].startswith("1 segment, 1 token, longest 1")
    assert one["compute"] == "1.05 MFLOP forward in tiles; padded 64 FLOP (16384 times)"
    assert lines(fj.plan(jagged([1], 1, 16), jagged([2], 1, 16)))["batch"].startswith("1 segment, 1 x 2 tokens")
    assert lines(fj.plan(jagged([0, 0], 1, 16)))["compute"] == "0 FLOP forward in tiles; padded 0 FLOP (all)"
    assert [explain.si(x, "B") for x in (0, 999, 999.6, 1000, 999_999, 1e15, 1.64e16, 1e27)] == [
        "0 B", "999 B", "1 kB", "1 kB", "1 MB", "1 PB", "16.4 PB", "1e+03 YB",
    ]  # fmt: skip
    assert [explain.share(x, 8) for x in (2, 80, 80.8)] == ["25%", "10 times", "10 times"]


def test_long_masks_are_cut_in_the_text_and_whole_in_the_facts() -> None:
    mask = fj.PerHead([fj.Window(i, 0) for i in range(200)])
    plan = fj.plan(jagged([5], 200, 1), mask=mask)
    assert max(map(len, plan.explain().splitlines())) < 1100
    assert explain.facts(plan)["mask"] == repr(mask)


def test_counts_of_plans_by_hand_in_facts() -> None:
    plan = fj.plan(jagged([48], 4, 8), mask=Causal(), block_size=16)
    found = explain.facts(plan)
    assert (found["tiles"], found["tiles_full"], found["grid"]) == (6, 3, [3, 3])
    assert (found["density"], found["flops"]) == (plan.density, plan.flops)
