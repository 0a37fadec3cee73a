"""The suite ``data`` plans what it says, checks it, and finds what is wrong."""

from __future__ import annotations

from dataclasses import replace

from flexjag.bench.measuring.schedule import run_suite
from flexjag.bench.suites.data import BUCKETS, ORDER, OURS, QUICK_SIZES, Epoch
from flexjag.bench.suites.registry import Options, find
from flexjag.data import TokenBudgetSampler

QUICK = Options(quick=True, device="cpu", rounds=2, memory=False)


def test_a_quick_run_has_all_arms_and_figures() -> None:
    (case,) = results = run_suite(find("data"), QUICK, lambda text: None)
    assert [(arm.name, arm.status, len(arm.seconds)) for arm in case.arms] == [
        (name, "ok", 2) for name in (OURS, BUCKETS, ORDER)
    ]
    ours, buckets, order = (arm.extra for arm in case.arms)
    assert ours["fill"] > max(buckets["fill"], order["fill"])
    assert ours["work_balance"] > max(buckets["work_balance"], order["work_balance"])
    figures = find("data").figures(QUICK, results)
    assert all(f.limit is None for f in figures)
    assert [f.text for f in figures if f.value is None] == [figures[1].text]  # memory


def test_the_full_run_has_the_limits() -> None:
    limits = [f.limit for f in find("data").figures(Options(), []) if f.limit is not None]
    assert limits == ["<= 5", "<= 500", ">= 0.98"]


def test_wrong_plans_are_found(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    epoch = Epoch(QUICK_SIZES, seed=0)
    found = epoch.arms()[OURS]()
    assert epoch.wrong(OURS, found) is None
    assert epoch.wrong(BUCKETS, replace(found, tokens=10**9)) == "it has samples more than once"
    whole = TokenBudgetSampler.__iter__
    monkeypatch.setattr(TokenBudgetSampler, "__iter__", lambda self: iter(list(whole(self))[1:]))
    assert epoch.wrong(OURS, found) == "not every sample is in one batch"
    monkeypatch.setattr(TokenBudgetSampler, "__iter__", lambda self: iter([range(2000)] if self.rank == 0 else []))
    assert epoch.wrong(OURS, found) == "a batch exceeds the budget"
