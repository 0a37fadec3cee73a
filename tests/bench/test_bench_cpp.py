"""The suite of the CPU kernels: its arms are right, its limits are those it promises, and its checks can fail."""

from __future__ import annotations

import pytest
import torch

from flexjag.bench import main
from flexjag.bench.arms.attention import LOOP, PADDED, SHARED
from flexjag.bench.arms.cpu import CPP, IN_PYTHON, PLANNED, SEGMENTS, CpuBatch
from flexjag.bench.arms.dropout import WITHOUT, DroppedBatch
from flexjag.bench.arms.product import PRODUCT, product
from flexjag.bench.measuring.lengths import uniform_lengths
from flexjag.bench.measuring.schedule import run_suite
from flexjag.bench.suites.cpp import BIAS, COMPILATION, POINTS, WINDOW, CpuJob
from flexjag.bench.suites.normalizers import HSTU, QUICK_SIZES
from flexjag.bench.suites.registry import ArmResult, CaseResult, Options, find
from flexjag.kernels.cpp import build

QUICK = Options(quick=True, device="cpu", rounds=2, memory=False)
needs_compiler = pytest.mark.skipif(build.refusal() is not None, reason=str(build.refusal()))


def quietly(_text: str) -> None:
    pass


@pytest.mark.slow
@needs_compiler
def test_every_arm_is_right_or_says_why_it_is_absent() -> None:
    results = run_suite(find("cpp"), QUICK, quietly)
    names = [case.name for case in results]
    assert len(names) == len(set(names))
    for case in results:
        for arm in case.arms:
            assert arm.status == "ok" or (arm.status == "skipped" and arm.reason), (case.name, arm)
            assert bool(arm.seconds) == (arm.status == "ok")
    figures = find("cpp").figures(QUICK, results)
    assert all(f.limit is None for f in figures), "a quick run proves nothing about speed"
    absent = {case.name for case in results for arm in case.arms if arm.status == "skipped"}
    for figure in figures:
        assert figure.value is not None or "memory" in figure.text or figure.text.split(": ")[0] in absent, figure


def test_full_figures_carry_the_acceptance_limits() -> None:
    figures = find("cpp").figures(Options(), [])
    assert all(f.value is None and f.met is None for f in figures)

    def limits(text: str) -> list[str | None]:
        return [f.limit for f in figures if text in f.text and f.limit is not None]

    ours = f" / {PLANNED}"
    assert limits(f"log-normal: time of {LOOP}{ours}") == [">= 2.3"] * 2
    assert limits(f"time of {PADDED}{ours}") == limits(f"time of {SHARED}{ours}") == [">= 12"] * 2
    assert limits(f"128 tokens each: time of {LOOP}{ours}") == [">= 2.5"] * 2
    assert limits(f"up to 64 tokens: time of {LOOP}{ours}") == [">= 3"] * 2
    assert limits(f"2,048 tokens each: time of {LOOP}{ours}") == [">= 1.4"] * 2
    assert limits(f"bfloat16: time of {LOOP}{ours}") == [">= 1.8"] * 2
    assert limits(f"{CPP} / {PRODUCT}") == [">= 0.8"] * 2
    assert limits(f"time of {SEGMENTS} / {CPP}") == [">= 3.5", ">= 3.5", ">= 3", ">= 3", ">= 3", ">= 2"]
    assert limits(f"time of {IN_PYTHON} / {CPP}") == ["<= 1.3"] * 3
    assert limits(f"dropout 0.1, forward, log-normal: time of {LOOP} / {CPP}") == [">= 3.5"]
    assert limits(f"dropout 0.1, forward + backward, log-normal: time of {LOOP} / {CPP}") == [">= 2"]
    assert limits(f"time of {CPP} / {WITHOUT}") == ["<= 3", "<= 4"]
    assert set(limits(f"memory of {CPP} / {SEGMENTS}")) == {"<= 1"}


def test_rates_are_useful_operations_by_time() -> None:
    point = POINTS[0]
    arms = [ArmResult(name, "ok", seconds=[s]) for name, s in ((CPP, 2.0), (PRODUCT, 1.0))]
    case = CaseResult(point.name, {"flops": 2 * 10**3, "product": 10}, arms)
    figures = {f.text.partition(": ")[2]: f.value for f in find("cpp").figures(Options(), [case])[:6]}
    assert figures[f"useful FLOP rate of {CPP} / {PRODUCT}"] == pytest.approx(0.5)
    assert figures[f"useful FLOP rate of {PLANNED} / {PRODUCT}"] is None
    assert figures[f"rate of {PRODUCT}"] == pytest.approx(2e-6)


def test_the_check_of_dropout_notices_a_missing_factor() -> None:
    batch = DroppedBatch("causal", [300, 200], 2, 16)
    loop = batch.dropped()[0]
    (out,) = loop.make()()
    assert loop.check((out,)) is None
    assert "standard errors" in str(loop.check((out * 0.9,)))


def test_there_is_nothing_to_measure_on_a_gpu() -> None:
    options = Options(device="cuda")
    assert find("cpp").cases(options) == []
    assert find("cpp").figures(options, []) == []


@needs_compiler
@pytest.mark.parametrize("kind", [WINDOW, BIAS])
def test_a_leak_between_segments_is_noticed_in_python_functions_too(kind: str) -> None:
    batch = CpuBatch(kind, [9, 1, 12], 2, 16, backward=True)
    (arm,) = batch.chosen(IN_PYTHON)
    assert arm.check(arm.make()()) is None
    batch.lengths = [22]  # what the check expects was computed before
    assert "output is off by" in str(arm.check(arm.make()()))


def test_without_a_compiler_the_reason_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXJAG_CPP", "0")
    turned_off = "FLEXJAG_CPP=0 turns it off"
    arms = CpuBatch("causal", [5, 3], 2, 16).chosen(SEGMENTS, CPP, PLANNED, IN_PYTHON)
    assert [arm.absent for arm in arms] == [None, *[turned_off] * 3]
    assert [arm.absent for arm in CpuJob(HSTU, QUICK_SIZES, True, QUICK).arms()] == [None, turned_off, turned_off]
    compilation = find("cpp").cases(QUICK)[-1]
    assert (compilation.name, compilation.facts["compiler"]) == (COMPILATION, None)
    assert {(arm.status, arm.reason) for arm in compilation.run(quietly)} == {("skipped", turned_off)}


def test_the_check_of_the_product_can_fail() -> None:
    arm = product(16, torch.float32, "cpu", seed=0)
    (right,) = arm.make()()
    assert arm.check((right,)) is None
    assert "output is off by" in str(arm.check((right + 1e-3,)))


def test_uniform_lengths() -> None:
    lengths = uniform_lengths(500, 8, seed=0)
    assert set(lengths) == set(range(1, 9))
    assert lengths == uniform_lengths(500, 8, seed=0)


def test_an_arm_needs_some_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cpp", "--quick", "--device", "cpu", "--arm-seconds", "0"]) == 2
    assert capsys.readouterr().err == "flexjag bench: --arm-seconds: must be over 0; got arm_seconds=0.0\n"
