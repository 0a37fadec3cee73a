"""The suites train and paper: every arm computes the same, and what does not is found."""

import copy
from dataclasses import replace

import pytest
import torch

from flexjag import Jagged
from flexjag.bench.measuring.padded import Expected, Padding
from flexjag.bench.measuring.schedule import run_suite
from flexjag.bench.suites import train as suites_train
from flexjag.bench.suites.paper import DENSE, FLASH, OURS, QUICK_GRID, SELF, TARGET, UNFUSED, PaperProblem
from flexjag.bench.suites.registry import Options, find
from flexjag.bench.suites.train import (
    DECODER,
    IGNORED,
    PACKED,
    PADDED,
    RECOMMENDER,
    SIZES,
    STEPS,
    Training,
    TrainingBatch,
    byte_pieces,
    curve_disagreement,
    item_pieces,
)

QUICK = Options(quick=True, device="cpu", rounds=2, memory=False)


def quietly(_text):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "paper"])
def test_every_arm_is_right(name):
    results = run_suite(find(name), QUICK, quietly)
    names = [case.name for case in results]
    assert len(names) == len(set(names))
    for case in results:
        assert [(arm.name, arm.status, arm.reason) for arm in case.arms] == [(a.name, "ok", None) for a in case.arms]
        assert all(len(arm.seconds) == QUICK.rounds for arm in case.arms)
        assert case.cut is None
    figures = find(name).figures(QUICK, results)
    assert all(f.limit is None for f in figures), "a quick run proves nothing about speed"
    assert all(f.value is not None and f.value > 0 for f in figures if "memory" not in f.text)


def test_full_figures_carry_their_limits():
    assert [f.limit for f in find("train").figures(Options(), [])] == [">= 2", ">= 1.4", None, None, None]
    assert all(f.limit is None for f in find("paper").figures(Options(), [])), "facts beside the published ones"
    published = [f.text for f in find("paper").figures(Options(), []) if "published" in f.text]
    assert [text.rsplit(": ", 1)[1].rstrip(")") for text in published] == [
        *("9x", "22x", "3x", "53 %", "2x", "3.5x", "2.52x", "3.06x")
    ]


@pytest.mark.slow
def test_train_arms_count_one_step_and_its_tokens():
    training = Training(DECODER, SIZES[DECODER]["quick"], QUICK)
    for arm in training.arms():
        assert arm.steps == STEPS
        assert arm.tokens == sum(sum(x.lengths) for x in training.batches) // STEPS
    (case, _) = run_suite(find("train"), QUICK, quietly)
    for arm in case.arms:
        middle = sum(arm.seconds) / 2  # the median of two
        assert arm.extra["tokens_per_second"] == pytest.approx(case.facts["tokens"] / middle)


def shifted(batch: TrainingBatch) -> Jagged:
    """The tokens, with the boundary of the first two segments one token off, towards the longer one."""
    first, second, *rest = batch.lengths
    step = 1 if first < second else -1
    return Jagged.from_lengths(batch.tokens.values, [first + step, second - step, *rest])


@pytest.mark.parametrize("case", [DECODER, RECOMMENDER])
def test_training_is_repeatable_takes_steps_and_a_leak_between_segments_is_found(case, monkeypatch):
    training = Training(case, SIZES[case]["quick"], QUICK)
    arms = {arm.name: arm for arm in training.arms()}
    call = arms[PACKED].make()
    first = call()
    assert torch.equal(first, call()), "every call starts from the same weights"
    assert first.shape == (STEPS,)
    assert arms[PACKED].check(first) is None
    monkeypatch.setattr(suites_train, "RATE", 0.0)
    assert [x == y for x, y in zip(first.tolist(), call().tolist(), strict=True)] == [True] + [False] * (STEPS - 1)
    monkeypatch.undo()
    leaking = copy.copy(training)
    leaking.batches = [replace(x, tokens=shifted(x)) for x in training.batches]
    curve = next(arm for arm in leaking.arms() if arm.name == PACKED).make()()
    assert "the loss of step 1 is off by" in str(arms[PADDED].check(curve))


def test_curves_are_compared_step_by_step():
    exact = torch.tensor([5.0, 4.0, 3.0], dtype=torch.float64)
    rounded = exact.float()
    unit = torch.finfo(torch.float32).eps
    assert curve_disagreement(rounded, exact, rounded, unit, 1) is None
    off = rounded + torch.tensor([0.0, 1e-5, 0.0])
    assert "the loss of step 2 is off by 1.00e-05" in str(curve_disagreement(off, exact, rounded, unit, 1))
    assert curve_disagreement(off, exact, rounded, unit, 1000) is None
    nan = rounded * torch.tensor([1.0, 1.0, torch.nan])
    assert "the loss of step 3 is off by nan" in str(curve_disagreement(nan, exact, rounded, unit, 1000))


def test_batches_hold_the_same_tokens_in_both_forms():
    lengths = [3, 1, 5]
    pieces = byte_pieces(lengths, seed=0)
    assert [x.shape[0] for x in pieces] == lengths
    assert all(torch.equal(x, y) for x, y in zip(pieces, byte_pieces(lengths, seed=0), strict=True))
    assert all(int(x.min()) >= 0 and int(x.max()) < 256 for x in pieces)
    batch = TrainingBatch.of(pieces, "cpu")
    assert torch.equal(batch.tokens.values, torch.cat(pieces))
    assert batch.padded_tokens.shape == batch.padded_targets.shape == (3, 5)
    for s, piece in enumerate(pieces):
        n = piece.shape[0]
        assert torch.equal(batch.padded_tokens[s, :n], piece)
        assert torch.equal(batch.padded_targets[s, : n - 1], piece[1:])
        assert (batch.padded_targets[s, n - 1 :] == IGNORED).all()
    assert torch.equal(batch.targets[batch.targets != IGNORED], batch.padded_targets[batch.padded_targets != IGNORED])


def test_items_are_walks_within_the_vocabulary():
    (walk,) = item_pieces([50], items=7, seed=1)
    assert 0 <= int(walk.min()) <= int(walk.max()) < 7
    assert set((walk.diff() % 7).tolist()) == {1, 2, 3}


def test_padding_goes_there_and_back_with_an_empty_segment():
    padding = Padding([2, 0, 3], "cpu", longest=4)
    x = torch.arange(1.0, 11.0).view(5, 2)
    dense = padding.pad(x)
    assert dense.shape == (3, 4, 2)
    assert torch.equal(padding.unpad(dense), x)
    assert padding.real.tolist() == [[True] * 2 + [False] * 2, [False] * 4, [True] * 3 + [False]]
    assert dense[~padding.real].eq(0).all()
    assert padding.fill == 5 / 12
    assert Padding([2, 3], "cpu").longest == 3


def test_expected_rejects_what_is_not_rounding():
    expected = Expected(lambda dtype: (torch.ones(4, dtype=dtype) / 3,), torch.float32)
    assert expected.check((torch.ones(4) / 3,)) is None
    assert "output is off by" in str(expected.check((torch.ones(4) / 3 + 1e-6,)))


@pytest.mark.parametrize("job", [SELF, TARGET])
def test_paper_has_four_arms_and_finds_a_wrong_padding_mask(job, monkeypatch):
    problem = PaperProblem(job, QUICK_GRID, 32, 0.5, QUICK)
    arms = {arm.name: arm for arm in problem.arms()}
    assert list(arms) == [DENSE, UNFUSED, FLASH, OURS]
    flash = PaperProblem._flash
    monkeypatch.setattr(PaperProblem, "_flash", lambda self, mask, *x: flash(self, torch.ones_like(mask), *x))
    wrong = {arm.name: arm for arm in PaperProblem(job, QUICK_GRID, 32, 0.5, QUICK).arms()}[FLASH]
    assert "is off by" in str(wrong.check(wrong.make()()))
    assert arms[OURS].check(arms[OURS].make()()) is None


def test_paper_with_an_empty_segment():
    problem = PaperProblem(SELF, QUICK_GRID, 16, 0.1, QUICK)
    assert 0 in problem.lengths, "lengths of at most two"
    assert [arm.check(arm.make()()) for arm in problem.arms()] == [None] * 4
