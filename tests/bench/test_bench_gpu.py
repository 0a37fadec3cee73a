"""flexjag.bench gpu: budgets, processes that hang, tests that fail, and machines where little is installed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexjag.bench import gpu, main, outcomes, preflight, processes, run, smoke, sync, warm
from flexjag.bench.measuring import nvml
from flexjag.bench.measuring.schedule import run_suite
from flexjag.bench.processes import Clock, run_process
from flexjag.bench.suites.registry import Arm, BenchError, Case, Options, Suite, find

QUICK = Options(quick=True, device="cpu", rounds=2, memory=False)
OPTIONAL = tuple(name for name in preflight.OPTIONAL if name not in ("xdist", "hypothesis"))  # those make it quick

TESTS = """
import pytest
pytestmark = pytest.mark.cuda
def test_right(): pass
def test_wrong(): assert 1 == 2
@pytest.mark.skip(reason="not here")
def test_absent(): pass
"""


def quietly(_text):
    pass


def suite_of(*cases):
    return Suite("demo", "A demonstration.", lambda options: cases, lambda options, results: [])


def case(name, seconds, calls):
    def call():
        calls.append(name)
        time.sleep(seconds)

    arms = [Arm(arm, lambda: call, lambda result: None) for arm in ("first", "second")]
    return Case(name, {}, lambda: arms, lambda: arms)


@pytest.mark.slow
def test_an_interruption_loses_one_case_and_the_file_says_so(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    options, path = Options(rounds=2, memory=False), tmp_path / "new" / "x.json"
    results = run.begin(options)
    broken = Case("broken", {}, interrupt, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.measure(results, [suite_of(case("whole", 0.0, []), broken)], options, path, quietly)
    (suite,) = run.read(path)["suites"]
    assert suite["cut"] == "interrupted"
    assert [x["name"] for x in suite["cases"]] == ["whole"]
    assert [len(arm["seconds"]) for arm in suite["cases"][0]["arms"]] == [2, 2]
    assert sorted(path.parent.iterdir()) == [path]


@pytest.mark.slow
def test_compile_suite_stops_between_batches():
    cases = run_suite(find("compile"), Options(quick=True, memory=False, budget=1e-6), quietly)
    assert [x.cut.split(":")[0] for x in cases] == ["not begun"] * 2
    training, _ = find("compile").cases(Options(quick=True, memory=False, deadline=time.monotonic() - 1))
    compiled, eager = training.run(quietly)
    assert compiled.status == eager.status == "ok"
    assert len(compiled.seconds) == compiled.extra["batches_for_which_there_was_time"] == 1


def test_clock_shares_what_is_left_by_weight(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: now[0]))
    clock = Clock(80.0, ["mask-build", "ops", "tune", "rest"], start=100.0)
    assert clock.share("mask-build", "ops") == pytest.approx(80 * 4 / 8.5)
    now[0] += 5.0
    assert clock.share("tune") == pytest.approx(75 * 4 / 4.5)
    assert clock.share("rest") == clock.left == 75.0
    now[0] += 100.0
    assert clock.left < 0
    assert Clock(0.0, ["sync"], start=0.0).share("sync") == 0.0


@pytest.mark.slow
def test_process_that_hangs_is_ended_with_its_own_processes_and_keeps_what_it_printed():
    sleeper = "import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', '{}'])"
    started = time.monotonic()
    ended = run_process([sys.executable, "-c", sleeper.format("import time; time.sleep(600)")], 3.0)
    assert ended.output == "begun\n"
    assert ended.cut == "ended after the 3 s that it had"
    assert time.monotonic() - started < 300
    died = run_process([sys.executable, "-c", "import os; os.abort()"], 60.0)
    assert died.cut is not None
    assert "exit status -6" in died.cut


def test_outcomes_are_read_from_a_file_that_was_cut_off(tmp_path):
    path = tmp_path / "outcomes"
    assert outcomes.read(path) == {"counts": {}, "passed": {}, "failures": {}, "skips": {}, "slowest": {}}
    lines = [
        {"test": "a.py::b[x y]", "outcome": "passed", "seconds": 0.5},
        {"test": "a.py::c", "outcome": "failed", "seconds": 2.0, "reason": "assert 0\nwhole"},
        {"test": "a.py::d", "outcome": "skipped", "seconds": 0.0, "reason": "not here"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"test": "a.py::e", "outc')
    found = outcomes.read(path)
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert found["passed"] == {"a.py": ["b[x y]"]}
    assert found["failures"] == {"a.py::c": "assert 0\nwhole"}
    assert found["skips"] == {"not here": 1}
    assert list(found["slowest"]) == ["a.py::c", "a.py::b[x y]", "a.py::d"]


def run_blocked(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m flexjag.bench``, in which no process can import what is optional."""
    block = f"import sys\nfor name in {OPTIONAL!r}:\n    sys.modules[name] = None\n"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(block)
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "flexjag.bench", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )


@pytest.mark.slow
def test_dry_run_on_a_cpu_where_only_the_necessary_is_installed(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    asked = ["--device", "cpu", "--quick", "--no-memory", "--stage", "tests", "sync", "mask-build", "energy", "--tests"]
    done = run_blocked(tmp_path, "gpu", "--out", str(tmp_path / "out"), *asked, str(tmp_path / "test_some.py"))
    assert done.returncode == 1, done.stderr  # a test failed
    (path,) = (tmp_path / "out").glob("quick-cpu-*.json")
    results = json.loads(path.read_text())
    assert results["schema"] == 1
    assert [x for x in results["absent"] if x != "xdist"] == list(OPTIONAL)
    assert done.stderr.startswith("preflight: missing but optional: attn_gym (no arms of attention-gym); rich")
    assert results["tests"]["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    ((name, reason),) = results["tests"]["failures"].items()
    assert name.endswith("test_some.py::test_wrong")
    assert "assert 1 == 2" in reason
    assert results["sync"]["passed"] is None
    assert list(results["tests"]["passed"].values()) == [["test_right"]]
    assert [r["name"] for r in results["runs"]] == ["tests", "sync", "mask-build energy"]
    assert all(r["cut"] is None for r in results["runs"]), path.with_suffix(".log").read_text()
    build, energy = results["suites"]
    assert build["cut"] is None
    arms = {arm["name"]: arm for arm in build["cases"][0]["arms"]}
    assert len(arms["flexjag plan"]["seconds"]) == 2
    assert arms["attn-gym document mask, eager"]["status"] == "skipped"
    assert energy["cases"]
    log = path.with_suffix(".log").read_text()
    assert "== mask-build energy: " in log
    assert "def test_wrong(): assert 1 == 2" in log  # the failure, whole
    assert "flexjag plan" in log
    page = tmp_path / "page.md"
    assert main(["report", str(path), "--write", str(page)]) == 0
    assert "Tests that need a GPU: 1 passed, 1 failed, 1 skipped." in page.read_text()


def test_suite_without_time_is_recorded_as_cut(tmp_path):
    asked = ["--device", "cpu", "--quick", "--no-memory", "--stage", "sync", "mask-build"]
    assert main(["gpu", "--out", str(tmp_path), "--minutes", "0.0001", *asked]) == 0
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    (suite,) = results["suites"]
    assert (suite["name"], suite["cases"]) == ("mask-build", [])
    assert suite["cut"] == "ended after the 1 s that it had"
    assert "tests" not in results
    assert results["sync"]["detail"] == "ended after the 1 s that it had"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpu"], "the following arguments are required: --out"),
        (["gpu", "--out", "x", "--minutes", "0", "--device", "cpu"], "--minutes: must be over 0"),
        (["gpu", "--out", "x", "--stage", "nothing", "--device", "cpu"], "--stage: must be one of smoke, tests"),
        (["mask-build", "--budget", "0"], "--budget: must be over 0 seconds"),
    ],
)
def test_bad_requests(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_needs_a_gpu(tmp_path):
    with pytest.raises(BenchError, match="no CUDA device is available"):
        gpu.main(["--out", str(tmp_path)])
    assert nvml.driver_version() is None


def test_nvml_asks_for_the_gpu_that_torch_uses_by_its_identity(monkeypatch):
    pynvml, asked = pytest.importorskip("pynvml"), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid="1a2b-3c"))
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda name: asked.append(name) or 7)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: 1500 + handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda handle: 300_000 + handle)
    device = nvml.Device()
    assert asked == ["GPU-1a2b-3c"]
    assert (device.joules(), device.watts()) == (1.507, 300.007)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("missing", ["the driver", "the bindings"])
def test_without_nvml_there_is_no_driver_version_and_the_reason_is_said(monkeypatch, missing):
    pynvml = pytest.importorskip("pynvml")

    def fails():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fails)
    if missing == "the bindings":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.driver_version() is None
    reason = "NVML Shared Library Not Found" if missing == "the driver" else r"pip install 'flexjag\[bench\]'"
    with pytest.raises(nvml.NvmlError, match=reason):
        nvml.Device()


def test_sync_check_runs_on_a_cpu_and_reports_what_fails(monkeypatch):
    found = sync.check("cpu")
    assert found["passed"] is None
    assert "A CPU has nothing to wait for." in found["detail"]

    def waits(*args, **options):
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(sync, "plan", waits)
    found = sync.check("cpu")
    assert found["passed"] is False
    assert found["detail"] == "causal: RuntimeError: called a synchronizing CUDA operation"


@pytest.mark.slow
def test_smoke_checks_run_in_processes_of_their_own(tmp_path):
    found = smoke.check_all("cpu", tmp_path / "smoke.json", ["tiled", "plan on the device"])
    assert [x["name"] for x in found] == ["tiled", "plan on the device"]
    assert all(x["passed"] for x in found), found
    assert json.loads((tmp_path / "smoke.json").read_text())["checks"] == found


def test_smoke_tells_what_is_thrown_and_what_is_wrong(monkeypatch):
    def breaks(device, dtype, exact):
        raise RuntimeError("no such instruction")

    monkeypatch.setitem(smoke.CHECKS, "tiled", breaks)
    found = smoke.check("tiled", "cpu")
    assert not found["passed"]
    assert "Traceback" in found["wrong"]
    assert "no such instruction" in found["wrong"]
    monkeypatch.setitem(smoke.CHECKS, "tiled", lambda device, dtype, exact: (torch.ones(3, dtype=dtype) + (not exact),))
    assert smoke.check("tiled", "cpu")["wrong"] == "off in norm: result 0 by 1; allowed 0.0001"


@pytest.mark.slow
def test_warming_up_goes_on_behind_a_job_that_fails_and_does_nothing_twice(monkeypatch, capsys, tmp_path):
    done = []
    jobs = [lambda: 1 / 0, lambda: done.append(1), lambda: done.append(2), lambda: done.append(3)]
    monkeypatch.setattr(warm, "jobs", lambda stages, options: iter(jobs))
    (tmp_path / "2").touch()  # another process has begun it
    warm.main(tmp_path, 60.0, 0, ["attention"])
    assert done == [1, 3]
    assert "job 0: ZeroDivisionError" in capsys.readouterr().out
    warm.main(tmp_path, 60.0, 0, ["attention"])
    assert done == [1, 3]


@pytest.mark.cuda
def test_nothing_waits_for_the_device():
    found = sync.check("cuda")
    assert found["passed"], found["detail"]


@pytest.mark.cuda
def test_nvml_knows_this_gpu():
    device = nvml.Device()
    assert device.joules() > 0
    assert 0 < device.watts() < 5000
    assert nvml.driver_version()
