"""flexjag.bench: what is recorded and checked. Never how fast anything is."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from flexjag.bench import main, run
from flexjag.bench.arms.attention import AttentionBatch
from flexjag.bench.measuring import environment, measure
from flexjag.bench.measuring.measure import Results, disagreement, run_case
from flexjag.bench.measuring.schedule import run_suite
from flexjag.bench.report import arm_rows, figure_rows, to_markdown
from flexjag.bench.suites.compile import EDGES, Counter, batch_lengths
from flexjag.bench.suites.mask import causal_tiles, lognormal_lengths
from flexjag.bench.suites.registry import Arm, ArmResult, BenchError, Case, CaseResult, Figure, Options, find, load

QUICK = Options(quick=True, device="cpu", rounds=2, memory=False)


def quietly(_text):
    pass


def right(_result):
    return None


def one_case(*arms):
    return Case("case", {}, lambda: arms, lambda: arms)


def test_suites_register_themselves():
    assert {"mask-build", "attention", "compile"} <= set(load())
    with pytest.raises(BenchError, match=r"suite: must be one of .*mask-build.*; got suite='nothing'"):
        find("nothing")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mask-build", "attention"])
def test_every_arm_is_right_or_says_why_it_is_absent(name):
    results = run_suite(find(name), QUICK, quietly)
    names = [case.name for case in results]
    assert len(names) == len(set(names))
    for case in results:
        for arm in case.arms:
            if arm.status == "skipped":
                assert arm.reason
                assert not arm.seconds
            else:
                assert (arm.status, arm.reason) == ("ok", None), (case.name, arm)
                assert len(arm.seconds) == QUICK.rounds
    figures = find(name).figures(QUICK, results)
    assert all(f.limit is None for f in figures), "a quick run proves nothing about speed"
    timed = [f for f in figures if "memory" not in f.text]
    assert timed
    assert all(f.value is not None and f.value > 0 for f in timed)


def test_full_figures_carry_the_acceptance_limits_and_miss_values_without_samples():
    speedups = [">= 1.25", ">= 1.25", ">= 3", ">= 3"] * 2  # over two loops and two paddings, without and with the plan
    for name, limits in (
        ("mask-build", [">= 1000", "<= 0.02", "<= 2", "<= 10", "<= 600", "<= 12", "<= 12"]),
        ("attention", [*[">= 0.95"] * 2, *[">= 8"] * 4, *speedups, *["<= 0.3"] * 2, "<= 1.2"]),
        ("compile", ["<= 2"] * 6),
    ):
        figures = find(name).figures(Options(), [])
        assert [f.limit for f in figures if f.limit is not None] == limits
        assert all(f.value is None and f.met is None for f in figures)
    limits = [f.limit for f in find("attention").figures(Options(device="cuda"), []) if f.limit is not None]
    assert limits == [">= 9", ">= 22", ">= 3", ">= 2.13", *[">= 0.95"] * 4] * 2  # for each of two head dims


@pytest.mark.slow
def test_compile_suite_counts_graphs_and_checks_every_batch():
    results = run_suite(find("compile"), QUICK, quietly)
    graphs = [{"forward": 1, "backward": 1}, {"inference": 1}]
    for case, wanted in zip(results, graphs, strict=True):
        compiled, eager = case.arms
        assert (compiled.status, compiled.reason) == ("ok", None)
        assert eager.status == "ok"
        assert compiled.extra["graphs"] == compiled.extra["graphs_but_for_0_or_1_tokens"] == wanted
        assert len(compiled.seconds) == len(eager.seconds) == case.facts["batches"]
        assert compiled.extra["total_seconds"] == sum(compiled.seconds)
        assert 0 < compiled.extra["seconds_of_batches_that_compiled"] <= compiled.extra["total_seconds"]


@pytest.mark.slow
def test_compile_suite_reports_a_wrong_compiler_and_one_that_fails(monkeypatch):
    def wrong(self, direction, graph, inputs):
        return lambda *args: [x + 1e-3 if x.is_floating_point() else x for x in graph(*args)]

    def failing(self, direction, graph, inputs):
        raise RuntimeError("no such instruction")

    for compiler, status, reason in ((wrong, "wrong", "output is off by"), (failing, "failed", "no such instruction")):
        monkeypatch.setattr(Counter, "_as_it_is", compiler)
        inference = find("compile").cases(QUICK)[1]
        compiled, eager = inference.run(quietly)
        assert (compiled.status, compiled.seconds) == (status, [])
        assert reason in compiled.reason
        assert eager.status == "ok"


def test_compile_batches_differ_and_hold_the_sizes_that_compilers_specialise():
    batches = batch_lengths(50, seed=0)
    assert batches == batch_lengths(50, seed=0)
    assert len({(len(n), sum(n)) for n in batches}) > 45
    assert [batches[i] for i in EDGES] == [[1], [0, 0], [0, 1], [7]]


def test_wrong_failing_absent_and_oversized_arms_are_reported_and_never_timed():
    calls = []

    def arm(name, run=lambda: 1, check=right, **options):
        def call():
            calls.append(name)
            return run()

        return Arm(name, lambda: call, check, **options)

    def fail():
        raise RuntimeError("first line\nsecond line")

    def no_memory():
        raise AssertionError("a skipped arm must not be made")

    case = one_case(
        arm("good"),
        arm("wrong", check=lambda result: f"{result} is not 2"),
        arm("failing", fail),
        arm("absent", absent="no such library"),
        Arm("oversized", no_memory, right, needs=10**18),
    )
    good, wrong, failing, absent, oversized = run_case("none", case, QUICK, quietly)
    assert (good.status, len(good.seconds)) == ("ok", QUICK.rounds)
    assert (wrong.status, wrong.reason, wrong.seconds) == ("wrong", "1 is not 2", [])
    assert (failing.status, failing.reason, failing.seconds) == ("failed", "RuntimeError: first line second line", [])
    assert (absent.status, absent.reason, absent.seconds) == ("skipped", "no such library", [])
    assert oversized.status == "skipped"
    assert "needs about 1000000000.0 GB, over 60% of the" in oversized.reason
    assert calls.count("wrong") == calls.count("failing") == 1
    assert calls.count("good") == 2 + QUICK.rounds  # the check, a warm-up, the samples


@pytest.mark.slow
def test_an_arm_that_fails_while_it_is_timed_ends_and_the_others_go_on():
    left = [1, 1, 1]  # the check, a warm-up and one sample
    cases = one_case(Arm("a", lambda: lambda: left.pop(), right), Arm("b", lambda: lambda: None, right))
    a, b = run_case("none", cases, Options(rounds=3, memory=False), quietly)
    assert (a.status, a.reason, a.seconds) == ("failed", "IndexError: pop from empty list", [])
    assert len(b.seconds) == 3


def test_arms_are_interleaved():
    calls = []
    arms = [Arm(n, lambda n=n: lambda: calls.append(n), right) for n in "abc"]
    run_case("none", one_case(*arms), Options(rounds=4, memory=False), quietly)
    rounds = [calls[i : i + 3] for i in range(6, len(calls), 3)]
    assert len(rounds) == 4
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)


@pytest.mark.slow
def test_a_slow_arm_stops_after_three_samples_and_the_others_go_on():
    options = Options(rounds=5, seconds_per_arm=0.0, memory=False)
    (result,) = run_case("none", one_case(Arm("a", lambda: lambda: None, right)), options, quietly)
    assert len(result.seconds) == 3


def test_a_sample_on_a_gpu_is_one_short_do_bench_that_flushes_the_cache(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    events = []

    class Event:
        """Counts a millisecond per call."""

        def __init__(self, enable_timing):
            pass

        def record(self):
            self.at = events.count("call")

        def elapsed_time(self, other):
            return float(other.at - self.at)

    class Driver:
        """A GPU on which nothing runs."""

        def get_device_interface(self):
            return SimpleNamespace(Event=Event, synchronize=lambda: None)

        def get_empty_cache_for_benchmark(self):
            return None

        def clear_cache(self, cache):
            events.append("flush")

    monkeypatch.setattr(testing.runtime, "driver", SimpleNamespace(active=Driver()))
    assert measure._on_gpu(lambda: events.append("call"))() == 1e-3
    timed = events[-2 * measure.SAMPLE_MS :]
    assert timed == ["flush", "call"] * measure.SAMPLE_MS
    assert len(events) <= 50, "a sample is short"


@pytest.mark.cuda
def test_a_sample_on_a_gpu_takes_what_its_kernels_take():
    x = torch.zeros(2**27, device="cuda")  # 0.5 GB, ten times the largest cache
    call = lambda: x.add_(1.0)  # noqa: E731
    call()
    kernels = measure._kernels(call, 1)["kernel_seconds"]
    assert 0.8 * kernels < measure._on_gpu(call)() < 2 * kernels


def test_a_slow_call_on_a_gpu_is_timed_once_by_the_clock(monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure, "free_memory", lambda device: None)
    monkeypatch.setattr(measure, "_kernels", lambda call, steps: {})
    monkeypatch.setattr(measure, "_on_gpu", lambda call: lambda: used.append(call) or 0.5)
    options = Options(device="cuda", rounds=4, memory=False)
    arms = [Arm(n, lambda s=s: lambda: time.sleep(s), lambda x: None) for n, s in (("slow", 0.11), ("fast", 0.0))]
    slow, fast = run_case("none", one_case(*arms), options, quietly)
    assert len(used) == 4, "one for each round of the fast arm"
    assert fast.seconds == [0.5] * 4
    assert len(slow.seconds) == 4
    assert min(slow.seconds) > measure.SLOW_CALL


def test_disagreement_tells_rounding_from_errors():
    exact = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = exact.float()
    assert disagreement([plain], [exact], [plain]) is None
    assert "output is off by" in str(disagreement([plain + 1e-4], [exact], [plain]))
    assert "output is off by nan" in str(disagreement([plain * torch.nan], [exact], [plain]))
    assert "shape" in str(disagreement([plain[1:]], [exact], [plain]))
    assert disagreement([plain], [exact, exact], [plain, plain]) == "1 results instead of 2"


def test_attention_check_rejects_a_leak_between_segments():
    batch = AttentionBatch("causal", [20, 1, 40], 2, 16)
    q, k, v = (x.transpose(0, 1)[None] for x in batch.leaves)
    leaking = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
    assert all("output is off by" in str(arm.check((leaking,))) for arm in batch.arms())


@pytest.mark.parametrize("lengths", [[1], [300], [128, 128], [5, 250, 1, 1, 127], [129, 383, 64]])
def test_tile_oracle_against_the_dense_mask(lengths):
    n = torch.tensor(lengths)
    segment, token = torch.arange(len(lengths)).repeat_interleave(n), torch.arange(sum(lengths))
    dense = (segment[:, None] == segment) & (token[:, None] >= token)
    grid = -(-sum(lengths) // 128)
    padded = torch.zeros(grid * 128, grid * 128, dtype=torch.bool)
    padded[: dense.shape[0], : dense.shape[1]] = dense
    tiles = padded.view(grid, 128, grid, 128)
    some, every = tiles.any(3).any(1), tiles.all(3).all(1)
    row, col = some.nonzero(as_tuple=True)
    assert torch.equal(causal_tiles(n), torch.stack([row, col, every[row, col].long()]))


@pytest.mark.parametrize("tokens", [1024, 5000, 32768])
def test_lognormal_lengths_are_seeded_and_sum_up(tokens):
    lengths = lognormal_lengths(tokens, seed=0)
    assert int(lengths.sum()) == tokens
    assert int(lengths.min()) >= 1
    assert torch.equal(lengths, lognormal_lengths(tokens, seed=0))
    assert not torch.equal(lengths, lognormal_lengths(tokens, seed=1))


def sample_results():
    arms = [
        ArmResult("fast", "ok", None, [0.010, 0.012, 0.011], 0.5, 12_345_678, "peak RSS", {}),
        ArmResult("a | b", "wrong", "output is off by 1", [], None, None, None, {}),
        ArmResult("compiled", "ok", None, [1.5], 1.5, None, None, {"graphs": {"forward": 1}}),
    ]
    figures = [
        Figure("ratio", 7.0, "x", ">= 6"),
        Figure("seconds", 2.5, "s", "<= 2"),
        Figure("lost", None, "x", "<= 1"),
    ]
    suite = {"name": "demo", "about": "A demonstration.", "cases": [asdict(CaseResult("case", {"tokens": 5}, arms))]}
    suite["figures"] = [asdict(f) | {"met": f.met} for f in figures]
    return {"schema": 1, "quick": False, "environment": environment.describe("cpu"), "suites": [suite]}


def test_report_rows():
    (suite,) = sample_results()["suites"]
    assert figure_rows(suite) == [
        ("ratio", "7x", ">= 6", "yes"),
        ("seconds", "2.50 s", "<= 2 s", "no"),
        ("lost", "not measured", "<= 1", ""),
    ]
    fast, wrong, compiled = arm_rows(suite["cases"][0])
    assert fast == ("fast", "11.0 ms", "10.5 ms to 11.5 ms", "3", "500 ms", "12.3 MB", "")
    assert wrong == ("a | b", "", "", "", "", "", "wrong: output is off by 1")
    assert compiled[-1] == "graphs: 1 forward"


def test_markdown_page():
    page = to_markdown([sample_results()])
    assert "| ratio | 7x | >= 6 | yes |" in page
    assert "| a \\| b |" in page
    assert "wrong: output is off by 1" in page
    assert "A quick run" not in page


def test_results_lookup_ignores_arms_without_samples():
    found = Results([CaseResult("c", {}, [ArmResult("a", "wrong", "no"), ArmResult("b", "ok", None, [3.0, 1.0, 2.0])])])
    assert found.seconds("c", "a") is None
    assert found.seconds("c", "b") == 2.0
    assert found.memory("c", "b") is None
    assert found.extra("no", "b", "graphs") is None


@pytest.mark.slow
def test_command_line_writes_json_and_a_page(tmp_path, capsys):
    assert main(["mask-build", "--quick", "--no-memory", "--device", "cpu", "--json", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    (path,) = tmp_path.glob("quick-cpu-*.json")
    assert json.loads(path.read_text()) == printed
    assert printed["quick"] is True
    assert [s["name"] for s in printed["suites"]] == ["mask-build"]
    page = tmp_path / "docs" / "performance.md"
    assert main(["report", str(path), "--write", str(page)]) == 0
    assert "create_block_mask, eager" in page.read_text()
    assert "**A quick run" in page.read_text()
    assert main(["report", str(path), "--print"]) == 0
    assert "flexjag plan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "suite: must be one of"),
        (["--nothing"], "unrecognized arguments: --nothing"),
        (["report"], "the following arguments are required"),
        (["report", "no-such-file.json"], "no-such-file.json"),
        (["report", "BAD"], "is not JSON"),
        (["report", "OLD"], "must be results of flexjag bench, schema 1"),
    ],
)
def test_bad_requests_are_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    (tmp_path / "BAD").write_text("{")
    (tmp_path / "OLD").write_text("{}")
    arguments = [str(tmp_path / a) if a in ("BAD", "OLD") else a for a in arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("flexjag bench: ")
    assert message in error
    assert error.count("\n") == 1


def test_module_entry_point_passes_on_the_exit_code():
    done = subprocess.run(
        [sys.executable, "-m", "flexjag.bench", "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("flexjag bench: suite: must be one of")


def test_progress_elsewhere_than_on_a_terminal_is_a_line_a_case(capsys, monkeypatch):
    with run.progress() as tell:
        for text in ("a: one: checking x", "a: one: timing x, sample 1", "a: two: checking x", "b: two: checking x"):
            tell(text)
        monkeypatch.setattr(run, "SILENCE", 0.0)
        tell("b: two: timing x, sample 1")
    printed = capsys.readouterr()
    lines = [line.partition(" s  ")[2] for line in printed.err.splitlines()]
    assert lines == ["a: one: checking x", "a: two: checking x", "b: two: checking x", "b: two: timing x, sample 1"]
    assert printed.out == ""
