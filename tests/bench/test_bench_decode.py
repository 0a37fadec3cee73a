"""The suite ``decode``: its arms are right, its limits are those it promises, and its check can fail."""

from __future__ import annotations

import pytest
import torch

from flexjag.bench.arms.decode import OURS, DecodeBatch, DecodeSizes
from flexjag.bench.measuring.schedule import run_suite
from flexjag.bench.suites.registry import Options, find

QUICK = Options(quick=True, device="cpu", rounds=1, memory=False)
SIZES = DecodeSizes([5, 1, 9], 2, 2, 4, 2, 8)


def batch() -> DecodeBatch:
    return DecodeBatch(SIZES, torch.float32, "cpu", seed=0)


@pytest.mark.parametrize("name", [arm.name for arm in batch().arms()])
def test_every_arm_is_right_each_time_it_is_called(name: str) -> None:
    (arm,) = [arm for arm in batch().arms() if arm.name == name]
    call = arm.make()
    for _ in range(3):
        found = call()
        assert [x.shape for x in found] == [(3, 4, 8)] * 2
        assert arm.check(found) is None
    assert "output of layer 1 is off by" in str(arm.check((found[0], found[1] + 1e-3)))


@pytest.mark.slow
def test_a_quick_run_has_all_arms_and_figures() -> None:
    results = run_suite(find("decode"), QUICK, lambda text: None)
    assert {arm.status for case in results for arm in case.arms} == {"ok"}
    figures = find("decode").figures(QUICK, results)
    assert all(f.limit is None for f in figures)
    assert all((f.value is None) == ("memory" in f.text) for f in figures)


def test_the_full_run_has_the_limits() -> None:
    found = find("decode").figures(Options(), [])
    assert [f.limit for f in found if f.limit is not None] == [">= 1.5", ">= 3"]
    assert all(OURS in f.text and f.value is None for f in found)
