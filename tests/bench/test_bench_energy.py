"""flexjag.bench.measuring.energy: counters, wrap-around, and no figure where nothing counts."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from flexjag.bench.measuring import energy
from flexjag.bench.measuring.energy import NoCounterError, NvmlCounter, RaplCounter, measure_energy
from flexjag.bench.measuring.schedule import run_suite
from flexjag.bench.suites import energy as suites_energy
from flexjag.bench.suites.registry import Options, find

QUICK = Options(quick=True, device="cpu", rounds=2, memory=False)


def quietly(_text):
    pass


class Steady:
    """One joule more at every reading."""

    name = "a steady counter"

    def __init__(self):
        self.readings = itertools.count()

    def read(self):
        return float(next(self.readings))

    def watts(self):
        return 250.0


def package(root, number, microjoules, most=10_000_000):
    folder = root / f"intel-rapl:{number}"
    folder.mkdir()
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder / "energy_uj"


def test_rapl_adds_packages_and_survives_wrap_around(tmp_path):
    first, second = package(tmp_path, 0, 1_000_000), package(tmp_path, 1, 9_000_000)
    package(tmp_path, "0:0", 500_000)  # a part of the first package
    counter = RaplCounter(tmp_path)
    assert counter.read() == 0.0
    first.write_text("2500000\n")
    assert counter.read() == 1.5
    second.write_text("499999\n")  # 1,000,000 to its end, one step to 0, and 499,999
    assert counter.read() == 1.5 + 1.5
    assert counter.read() == 3.0


def test_no_counter_is_a_reason_and_not_a_guess(tmp_path):
    with pytest.raises(NoCounterError, match="no processor counts energy: no intel-rapl in"):
        RaplCounter(tmp_path)
    package(tmp_path, 0, 5).unlink()
    with pytest.raises(NoCounterError, match="cannot be read: No such file or directory"):
        RaplCounter(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_no_energy_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: torch.empty(0))  # has no uuid, as on ROCm
    with pytest.raises(NoCounterError, match="the GPU counts no energy"):
        NvmlCounter()


def test_window_is_filled_and_the_counter_read_before_and_after():
    calls = []
    used = measure_energy(lambda: calls.append(0), 0.05, Steady(), "cpu")
    assert len(calls) == len(used.seconds) > 1
    assert used.elapsed >= 0.05
    assert sum(used.seconds) <= used.elapsed
    assert used.joules == 1.0
    extra = used.extra(10, Steady())
    assert extra["calls"] == len(calls)
    assert extra["joules_per_call"] == 1.0 / len(calls)
    assert extra["tokens_per_joule"] == 10.0 * len(calls)
    assert extra["watts"] == 1.0 / used.elapsed
    assert "watts_by_sensor" not in extra, "it is asked once a second"
    assert measure_energy(lambda: None, 0.0, Steady(), "cpu").joules == 1.0, "there is at least one call"


def test_sensor_is_asked_once_a_second_beside_the_counter(monkeypatch):
    now = itertools.count(0.0, 0.6)
    monkeypatch.setattr(energy, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    used = measure_energy(lambda: None, 3.0, Steady(), "cpu")  # looks after 1.2 s and after 2.4 s
    assert used.sampled == [250.0, 250.0]
    assert used.joules == 3.0, "two readings between the first and the last"
    assert used.extra(1, Steady())["watts_by_sensor"] == 250.0


def test_counter_that_stands_still_gives_no_rate():
    assert energy.Usage(0.0, [1.0], 1.0).extra(10, Steady())["tokens_per_joule"] is None


def test_suite_measures_every_arm_with_a_counter(monkeypatch):
    monkeypatch.setattr(suites_energy.energy, "find_counter", lambda device: Steady())
    monkeypatch.setattr(suites_energy, "QUICK_WINDOW", 0.01)
    results = run_suite(find("energy"), QUICK, quietly)
    (case,) = results
    assert [(arm.status, arm.reason) for arm in case.arms] == [("ok", None)] * 3
    assert all(arm.extra["counter"] == "a steady counter" for arm in case.arms)
    assert all(arm.extra["tokens_per_joule"] == case.facts["tokens"] * arm.extra["calls"] for arm in case.arms)
    figures = find("energy").figures(QUICK, results)
    assert [f.unit for f in figures] == ["x", "x", "tokens/J"]
    assert all(f.value is not None and f.value > 0 for f in figures)


def test_suite_without_a_counter_skips_with_the_reason(monkeypatch):
    def none(device):
        raise NoCounterError("nothing counts")

    monkeypatch.setattr(suites_energy.energy, "find_counter", none)
    results = run_suite(find("energy"), QUICK, quietly)
    assert [(arm.status, arm.reason) for arm in results[0].arms] == [("skipped", "nothing counts")] * 3
    assert all(f.value is None for f in find("energy").figures(QUICK, results))


def test_suite_reports_a_wrong_arm(monkeypatch):
    monkeypatch.setattr(suites_energy.energy, "find_counter", lambda device: Steady())
    monkeypatch.setattr(suites_energy.EnergyBatch, "_loop", lambda self, q, k, v: q + k + v)
    (case,) = run_suite(find("energy"), QUICK, quietly)
    assert [arm.status for arm in case.arms] == ["ok", "ok", "wrong"]
    assert "output is off by" in case.arms[2].reason


@pytest.mark.cuda
def test_gpu_counts_its_energy():
    counter = energy.find_counter("cuda")
    x = torch.randn(4096, 4096, device="cuda")
    used = measure_energy(lambda: x @ x, 1.0, counter, "cuda")
    assert 0 < used.joules / used.elapsed < 5000
