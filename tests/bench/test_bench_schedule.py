"""flexjag.bench under a budget: what is measured first, what is left out, and what survives the end of a process."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexjag import Jagged
from flexjag.api.attention import attention
from flexjag.bench import gpu, main, preflight, run, warm
from flexjag.bench.arms.attention import AUTO, AttentionBatch
from flexjag.bench.arms.kinds import KINDS, useful_flops
from flexjag.bench.measuring import schedule
from flexjag.bench.measuring.measure import LATE, LATER
from flexjag.bench.measuring.schedule import Pace, run_suite
from flexjag.bench.processes import Ended
from flexjag.bench.suites import registry
from flexjag.bench.suites.registry import (
    NEEDED,
    PLAIN,
    Arm,
    ArmResult,
    BenchError,
    Case,
    CaseResult,
    Options,
    Suite,
    find,
)

TESTS = """
import pytest
pytestmark = pytest.mark.cuda
@pytest.mark.parametrize("x", ["a b", "c"])
def test_right(x): pass
def test_wrong(): assert 1 == 2
"""


def quietly(_text):
    pass


class Log:
    """Makes cases whose arms record that they are called."""

    def __init__(self):
        self.calls = []

    def case(self, name, seconds=0.0, arms=("a", "b"), **options):
        def call(arm):
            self.calls.append((name, arm))
            time.sleep(seconds)

        made = [Arm(arm, lambda arm=arm: lambda: call(arm), lambda result: None) for arm in arms]
        return Case(name, {"n": 1}, lambda: made, lambda: made, **options)

    @property
    def order(self):
        return list(dict.fromkeys(self.calls))


def suite_of(*cases, name="demo"):
    return Suite(name, "A demonstration.", lambda options: cases, lambda options, results: [])


def test_what_limits_need_comes_first_and_the_rest_behind_all_of_it():
    log = Log()
    cases = [log.case("late", late=True), log.case("first", needed=("b",)), log.case("second")]
    results = run_suite(suite_of(*cases), Options(rounds=2, quick=True, memory=False, budget=60), quietly)
    assert log.order == [("first", "b"), ("second", "a"), ("second", "b"), *[("late", x) for x in "ab"], ("first", "a")]
    assert [x.cut for x in results] == [None] * 3
    assert all(len(arm.seconds) == 2 for x in results for arm in x.arms)


def test_without_a_budget_all_arms_are_interleaved_in_the_order_of_the_suite():
    log = Log()
    cases = [log.case("late", late=True), log.case("first", needed=("b",))]
    run_suite(suite_of(*cases), Options(rounds=2, memory=False), quietly)
    assert log.order == [(case, arm) for case in ("late", "first") for arm in "ab"]


def test_a_case_that_cannot_be_complete_is_not_begun_and_says_so(monkeypatch):
    log, now = Log(), [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(schedule, "time", clock)
    monkeypatch.setattr(registry, "time", clock)

    def slow(name):
        arms = log.case(name).arms()

        def build():
            now[0] += 13.0
            return arms

        return Case(name, {}, build, build, ("a",))

    options = Options(rounds=2, memory=False, budget=20)
    one, two = run_suite(suite_of(slow("one"), slow("two")), options, quietly)
    assert (one.cut, len(one.arms[0].seconds)) == (None, 2)
    assert one.arms[1].reason == LATER
    assert two.cut == "not begun: it takes about 8 s, and 7 s of the 20 s were left"
    assert log.order == [("one", "a")]


def test_a_pace_follows_the_cases():
    pace = Pace()
    assert pace.expected(2) == 6.0
    pace.record(2, 18.0)
    assert pace.expected(2) == 12.0
    pace.record(2, 0.0)
    assert pace.expected(2) == 6.0


def test_plain_cases_are_those_that_compile_nothing_and_are_not_measured_again(tmp_path):
    log, path = Log(), tmp_path / "x.json"
    suite = suite_of(
        log.case("compiled"), log.case("plain", compiles=False), log.case("late", compiles=False, late=True)
    )
    options = Options(rounds=2, quick=True, memory=False, budget=60, part=PLAIN)
    results = run.begin(options)
    run.measure(results, [suite], options, path, quietly)
    assert log.order == [("plain", "a"), ("plain", "b")]
    assert run.read(path)["suites"][0]["cut"] == run.INTERRUPTED
    results = run.read(path)
    run.measure(results, [suite], Options(rounds=2, quick=True, memory=False, budget=60, part=NEEDED), path, quietly)
    assert log.order[2:] == [("compiled", "a"), ("compiled", "b")]
    assert len(log.calls) == 2 * len(log.calls[: len(log.calls) // 2])
    assert [x["name"] for x in run.read(path)["suites"][0]["cases"]] == ["plain", "compiled"]
    assert run.read(path)["suites"][0]["cut"] is None


def test_a_case_during_which_the_process_ended_is_not_tried_again_and_the_others_are(tmp_path):
    log, path = Log(), tmp_path / "x.json"
    options = Options(rounds=2, quick=True, memory=False, budget=60)

    def interrupt():
        raise KeyboardInterrupt

    deadly = Case("deadly", {"n": 2}, interrupt, interrupt)
    suite = suite_of(log.case("before", needed=("a",)), deadly, log.case("behind"))
    results = run.begin(options)
    with pytest.raises(KeyboardInterrupt):
        run.measure(results, [suite], options, path, quietly)
    assert run.read(path)["suites"][0]["running"] == "deadly"
    results = run.read(path)
    run.measure(results, [suite], options, path, quietly)
    (entry,) = run.read(path)["suites"]
    assert "running" not in entry
    before, lost, behind = entry["cases"]
    assert lost["cut"] == "ended early: the process ended while it was measured"
    assert lost["facts"] == {"n": 2}
    assert entry["cut"] == "1 of 3 cases had no time for all of it"
    assert all(len(arm["seconds"]) == 2 for case in (before, behind) for arm in case["arms"])
    assert log.order == [("before", "a"), ("behind", "a"), ("behind", "b"), ("before", "b")]


def test_arms_that_came_too_late_are_tried_again(tmp_path):
    log, options = Log(), Options(rounds=2, quick=True, memory=False, budget=60, part=NEEDED)
    suite = suite_of(log.case("one"))
    late = CaseResult(
        "one", {"n": 1}, [ArmResult("a", "ok", seconds=[1.0]), ArmResult("b", "skipped", LATE)], "ended early"
    )
    results = run.begin(options)
    results["suites"] = [{"name": "demo", "about": "", "cases": [asdict(late)], "figures": [], "running": "one"}]
    run.write(results, tmp_path / "x.json")
    run.forget_running(tmp_path / "x.json")
    results = run.read(tmp_path / "x.json")
    run.measure(results, [suite], options, None, quietly)
    (case,) = results["suites"][0]["cases"]
    assert log.order == [("one", "b")]
    assert case["cut"] is None
    assert [len(arm["seconds"]) for arm in case["arms"]] == [1, 2]


def test_an_error_of_the_device_ends_the_process_and_a_failing_case_does_not(tmp_path):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def no_memory():
        raise RuntimeError("CUDA out of memory")

    log, options = Log(), Options(rounds=2, quick=True, memory=False, budget=60, part=NEEDED)
    arms = [Arm("a", lambda: broken, lambda result: None)]
    suite = suite_of(Case("full", {}, no_memory, list), Case("broken", {}, lambda: arms, list), log.case("behind"))
    results = run.begin(options)
    with pytest.raises(BenchError, match=r"broken: after this error .* --into: .*illegal memory access"):
        run.measure(results, [suite], options, tmp_path / "x.json", quietly)
    assert results["suites"][0]["cases"][0]["cut"] == "failed: RuntimeError: CUDA out of memory"
    run.measure(results, [suite], options, tmp_path / "x.json", quietly)
    assert log.order == [("behind", "a"), ("behind", "b")]


def test_order_of_the_suites_on_a_gpu():
    names = [case.name for case in find("attention").cases(Options(device="cuda", budget=100)) if not case.late]
    assert names[:2] == [f"causal, forward + backward, sparsity 0.5, D {dim}" for dim in (64, 128)]
    plain = [c.name for c in find("attention").cases(Options(device="cuda", budget=100)) if not (c.compiles or c.late)]
    assert plain == [*names[:4], "large product"]
    first = [
        case.name.split(",")[0] for case in find("paper").cases(Options(device="cuda", budget=100)) if not case.late
    ]
    assert first == ["matmul", "softmax", "self-attention", "target attention"]
    names = [case.name for case in find("normalizers").cases(Options(device="cuda", budget=100))]
    assert names[:2] == ["HSTU attention, forward + backward", "stick-breaking attention, forward + backward"]
    assert len(names) == len(set(names)) == len(find("normalizers").cases(Options(device="cuda")))


@pytest.mark.parametrize("name", ["attention", "normalizers"])
def test_needed_arms_are_arms(name):
    for case in find(name).cases(Options(quick=True)):
        assert set(case.needed) <= {arm.name for arm in case.arms()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_attention_arms_are_checked_against_the_reference(kind):
    lengths = [300, 20, 0, 1, 129]
    batch = AttentionBatch(kind, lengths, 2, 16, torch.float64, True)
    leaves = [x.detach().double().requires_grad_() for x in batch.leaves]
    q, k, v = (Jagged.from_lengths(x, lengths) for x in leaves[:3])
    out = attention(q, k, v, mask=batch.kind.mask, score=batch._score(leaves), backend="reference").values
    torch.testing.assert_close(
        batch._exact(torch.float64), (out.detach(), *torch.autograd.grad(out, leaves, batch.grad))
    )
    allowed = sum(int(KINDS[kind].allowed(i[:, None], i[None]).sum()) for i in map(torch.arange, lengths))
    assert useful_flops(kind, lengths, 2, 16, backward=True) == 4 * 2 * 16 * allowed * 7 // 2


def test_kernels_are_compiled_once_for_sizes_that_share_them():
    names = [case.name for case in warm._distinct("paper", Options(device="cuda", budget=1))]
    assert len(names) == 4
    names = [case.name for case in warm._distinct("normalizers", Options(device="cuda", budget=1))]
    assert "HSTU attention, N = 256, forward" in names
    assert "HSTU attention, N = 1024, forward" not in names


@pytest.mark.slow
def test_only_tests_that_have_not_passed(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    asked = ["gpu", "--device", "cpu", "--quick", "--stage", "tests", "--tests", str(tmp_path), "--processes", "1"]
    assert main([*asked, "--out", str(tmp_path / "first")]) == 1
    (first,) = (tmp_path / "first").glob("*.json")
    (names,) = json.loads(first.read_text())["tests"]["passed"].values()
    assert sorted(names) == ["test_right[a b]", "test_right[c]"]
    (tmp_path / "test_some.py").write_text(TESTS.replace("1 == 2", "1 == 1"))
    assert main([*asked, "--out", str(tmp_path / "second"), "--not-passed", str(first)]) == 0
    (second,) = (tmp_path / "second").glob("*.json")
    tests = json.loads(second.read_text())["tests"]
    assert (list(tests["passed"].values()), tests["left_out"]) == ([["test_wrong"]], 2)
    assert main([*asked, "--out", str(tmp_path / "third"), "--not-passed", str(first), str(second)]) == 0


def test_results_of_another_device_do_not_tell_what_passed(tmp_path, capsys):
    results = {"schema": 1, "environment": {"capability": "9.0", "device_name": "H"}, "tests": {"passed": {}}}
    (tmp_path / "a.json").write_text(json.dumps(results))
    asked = ["gpu", "--device", "cpu", "--out", str(tmp_path), "--not-passed", str(tmp_path / "a.json")]
    assert main(asked) == 2
    assert "is of a H, not of this kind of device" in capsys.readouterr().err


def test_preflight_finds_what_the_code_imports_anywhere(tmp_path, monkeypatch):
    (tmp_path / "test_x.py").write_text("import helper\ndef test_y():\n    import no_such_package.part\n")
    (tmp_path / "helper.py").write_text("")
    found = preflight.look(["tests"], "cpu", [tmp_path / "test_x.py"])
    assert found.needed == ["no_such_package is not installed"]
    assert "missing and NEEDED: no_such_package" in str(found)
    assert preflight.look(["sync"], "cpu", [tmp_path]).needed == []
    monkeypatch.setattr(preflight, "COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CC", raising=False)
    assert any("C compiler" in x for x in preflight.look(["sync"], "cuda", []).needed)


def test_preflight_finds_nothing_missing_where_the_tests_run():
    assert preflight.look(gpu.stages(), "cpu", [gpu.ROOT / "tests"]).needed == []
    assert preflight.look(["tests"], "cpu", [gpu.ROOT / "tests" / "backends" / "test_cuda.py"]).needed == []


def test_a_missing_package_ends_the_run_unless_it_is_to_go_on(tmp_path, capsys):
    (tmp_path / "test_x.py").write_text("import no_such_package\n")
    asked = ["gpu", "--device", "cpu", "--quick", "--stage", "tests", "--tests", str(tmp_path), "--out", str(tmp_path)]
    assert main(asked) == 2
    assert "missing, and needed: no_such_package is not installed" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))
    assert main([*asked, "--anyway"]) == 1
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_another_process_takes_over_from_one_that_died(tmp_path, monkeypatch):
    seen = []

    def dies_once(command, limit, more=None, watch=None):
        path = Path(command[command.index("--into") + 1])
        seen.append(command[3 : command.index("--into")])
        results = run.read(path) if path.exists() else run.begin(Options(quick=True))
        case = asdict(CaseResult(f"case {len(seen)}", {}, []))
        entry = {"name": "mask-build", "about": "", "cases": [case], "figures": [], "cut": run.INTERRUPTED}
        results["suites"] = [entry | {"running": "deadly"} if len(seen) == 1 else entry | {"cut": None}]
        run.write(results, path)
        assert watch() is None
        (outer,) = tmp_path.glob("*.json")
        assert run.read(outer)["suites"][0]["cases"] == [case]  # at once
        return Ended("", 1.0, "ended with exit status -11", -11) if len(seen) == 1 else Ended("", 1.0, None, 0)

    monkeypatch.setattr(gpu, "run_process", dies_once)
    asked = ["gpu", "--device", "cpu", "--quick", "--out", str(tmp_path), "--stage", "mask-build", "step"]
    assert main(asked) == 0
    assert seen == [["mask-build", "step"]] * 2
    (path,) = tmp_path.glob("*.json")
    build, step = run.read(path)["suites"]
    assert build["cut"] is None
    assert step["cases"] == []
    assert [x["cut"] for x in run.read(path)["runs"]] == ["ended with exit status -11", None]


@pytest.mark.slow
def test_a_later_run_goes_on_with_the_suites_of_another(tmp_path, capsys):
    asked = ["gpu", "--device", "cpu", "--quick", "--no-memory", "--stage", "step"]
    assert main([*asked, "--out", str(tmp_path / "first")]) == 0
    (first,) = (tmp_path / "first").glob("*.json")
    results = run.read(first)
    kept, _ = results["suites"][0]["cases"]
    results["suites"][0] |= {"cases": [kept], "running": "window | prefix"}  # as if it had been killed there
    run.write(results, first)
    assert main([*asked, "--out", str(tmp_path / "second"), "--go-on", str(first)]) == 0
    (second,) = (tmp_path / "second").glob("*.json")
    (step,) = run.read(second)["suites"]
    assert [x["name"] for x in step["cases"]] == ["causal", "window | prefix"]
    assert step["cases"][0] == kept
    assert step["cases"][1]["cut"] is None
    assert run.read(second)["went_on"]["date"] == results["environment"]["date"]
    results["environment"]["torch"] = "1.0"
    run.write(results, first)
    assert main([*asked, "--out", str(tmp_path / "third"), "--go-on", str(first)]) == 2
    assert "is of 1.0, and here is" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_results_survive_the_end_of_the_run(tmp_path, kind):
    command = ["gpu", "--device", "cpu", "--quick", "--no-memory", "--out", str(tmp_path), "--stage", "attention"]
    process = subprocess.Popen([sys.executable, "-m", "flexjag.bench", *command], start_new_session=True)
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            files = list(tmp_path.glob("*.json"))
            suites = run.read(files[0])["suites"] if files else []
            if suites and suites[0]["cases"]:
                break
            time.sleep(0.1)
        process.send_signal(kind)
        status = process.wait()
    finally:
        for child in tmp_path.glob("suites-*"):  # its suites end by themselves
            assert kind == signal.SIGKILL, child
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert status == (-signal.SIGKILL if kind == signal.SIGKILL else 143)
    (file,) = tmp_path.glob("*.json")
    (suite,) = run.read(file)["suites"]
    first = suite["cases"][0]
    reasons = {arm["name"]: arm["reason"] for arm in first["arms"]}
    assert reasons[AUTO] is None
    assert LATER in reasons.values()
