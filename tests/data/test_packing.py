"""Packing equals one sample after the other, best fit first; budgets hold; nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjag.data.packing import Budget, best_fit_decreasing, check_lengths, fit
from flexjag.errors import DataError

LENGTHS = st.lists(st.integers(0, 12), max_size=60)


def one_by_one(lengths: list[int], room: int) -> list[int]:
    """The tokens of each pack, by the definition of best-fit-decreasing."""
    packs: list[int] = []
    for n in sorted((max(n, 1) for n in lengths), reverse=True):
        takes = [i for i, used in enumerate(packs) if room - used >= n]
        if takes:
            packs[min(takes, key=lambda i: room - packs[i])] += n
        else:
            packs.append(n)
    return sorted(packs)


@given(LENGTHS, st.integers(12, 40))
def test_it_is_best_fit_decreasing(lengths: list[int], room: int) -> None:
    found = best_fit_decreasing(np.array(lengths, np.int64), Budget(room))
    assert sorted(found.sums(np.maximum(np.array(lengths, np.int64), 1)).tolist()) == one_by_one(lengths, room)


@given(LENGTHS, st.integers(12, 40), st.integers(144, 600), st.integers(1, 9))
def test_budgets_hold_and_every_sample_is_packed_once(
    lengths: list[int], tokens: int, squares: int, samples: int
) -> None:
    n = np.array(lengths, np.int64)
    for budget in (Budget(tokens), Budget(None, squares), Budget(tokens, squares, samples)):
        packs = best_fit_decreasing(n, budget)
        assert sorted(packs.order.tolist()) == list(range(len(lengths)))
        assert (np.diff(packs.bounds) > 0).all()
        for b in range(len(packs)):
            inside = n[packs[b]]
            assert budget.max_tokens is None or inside.sum() <= budget.max_tokens
            assert budget.max_squares is None or (inside**2).sum() <= budget.max_squares
            assert budget.max_samples is None or len(inside) <= budget.max_samples
            assert packs.sums(n)[b] == inside.sum()


def test_packs_are_taken_by_index() -> None:
    packs = best_fit_decreasing(np.array([5, 4, 3, 2, 1]), Budget(6))
    chosen = packs.take(np.array([2, 0]))
    assert [chosen[b].tolist() for b in range(2)] == [packs[2].tolist(), packs[0].tolist()]
    assert len(packs.take(np.array([], np.int64))) == 0


def test_a_long_tail_fills_its_packs() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.2, 20_000).astype(np.int64), 1, 32768)
    packs = best_fit_decreasing(lengths, Budget(32768))
    assert lengths.sum() / (len(packs) * 32768) >= 0.99


def test_samples_over_the_budget_are_named_or_cut() -> None:
    lengths = np.array([3, 9, 2, 11])
    message = r"lengths: must fit .*truncate=True.*lengths\[1\]=9, longest=8, samples_over=2"
    with pytest.raises(DataError, match=message):
        fit(lengths, Budget(8), truncate=False)
    assert fit(lengths, Budget(8), truncate=True).tolist() == [3, 8, 2, 8]
    assert fit(lengths, Budget(None, 30), truncate=True).tolist() == [3, 5, 2, 5]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "max_tokens, max_squares: at least one must be given"),
        ({"max_tokens": 0}, "max_tokens: must be an int of at least 1; got max_tokens=0"),
        ({"max_tokens": 8.0}, "max_tokens: must be an int"),
        ({"max_tokens": 8, "max_samples": True}, "max_samples: must be an int"),
    ],
)
def test_budgets_that_are_none(budget: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Budget(**budget)  # type: ignore[arg-type]


def test_lengths_that_are_none() -> None:
    assert Budget(np.int64(8)).max_tokens == 8  # type: ignore[arg-type]
    assert check_lengths([]).tolist() == []
    for wrong, message in (([1.5], "float64"), ([[1]], r"shape=\(1, 1\)"), ([3, -1], r"lengths\[1\]=-1")):
        with pytest.raises(DataError, match=message):
            check_lengths(wrong)  # type: ignore[arg-type]
