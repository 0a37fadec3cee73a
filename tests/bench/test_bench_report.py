"""flexjag.bench report: the page, its pictures, and what a run of gpu adds."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from flexjag.bench import main, plots
from flexjag.bench.measuring import environment
from flexjag.bench.plots import Series, find_series
from flexjag.bench.report import Picture, to_markdown
from flexjag.bench.suites.registry import ArmResult, CaseResult, Figure

ROOT = Path(__file__).parents[2]


def case(name, facts, seconds=(2.0, 8.0), memory=(1_000_000, 4_000_000), cut=None):
    arms = [
        ArmResult(arm, "ok", None, [s], s, m, "peak RSS") if s else ArmResult(arm, "skipped", "absent")
        for arm, s, m in zip(("flexjag plan", "other"), seconds, memory, strict=True)
    ]
    return asdict(CaseResult(name, facts, arms, cut))


def growing(name, word, sizes):
    return [case(f"{name}, {n:,} {word}", {word: n}, (n / 10, n / 5)) for n in sizes]


def results_of(cases, **more):
    figures = [asdict(Figure("a ratio", 2.0, "x")) | {"met": None}]
    suite = {"name": "demo", "about": "A demonstration.", "cases": cases, "figures": figures, "cut": None}
    facts = environment.describe("cpu") | {"date": "2026-01-02T03:04:05Z"}
    return {"schema": 1, "quick": False, "seed": 0, "environment": facts, "suites": [suite], **more}


def test_series_are_cases_that_differ_in_one_number():
    cases = [*growing("long", "tokens", (3000, 10, 200)), *growing("short", "tokens", (5, 6)), case("alone", {})]
    (series,) = find_series({"cases": cases})
    assert (series.axis, series.title, series.x) == ("tokens", "long", [10.0, 200.0, 3000.0])
    assert find_series({"cases": growing("two", "tokens", (5, 6))}) == []
    assert find_series({"cases": [case(f"no fact, {n} tokens", {}) for n in range(3)]}) == []


def test_a_grid_has_a_series_for_each_of_its_axes_and_the_largest_is_drawn():
    cases = [
        case(f"job, sparsity {s}, length {n}", {"fill": s / 2, "length": n})
        for s in (0.1, 0.5, 0.95)
        for n in (64, 128, 256)
    ]
    length, sparsity = find_series({"cases": cases})
    assert (length.axis, length.title, length.x) == ("length", "job, sparsity 0.95", [64.0, 128.0, 256.0])
    assert (sparsity.axis, sparsity.title, sparsity.x) == ("sparsity", "job, length 256", [0.05, 0.25, 0.475])


def test_picture_shows_every_arm_and_is_the_same_each_time(tmp_path):
    cases = growing("docs | all", "tokens", (128, 1024, 8192))
    cases[2] = case("docs | all, 8,192 tokens", {"tokens": 8192}, (1.0, None), (None, None))
    (found, *_) = plots.draw([results_of(cases)], tmp_path)
    assert found[:2] == (0, "demo")
    path = found[2]
    assert path.name == "cpu-demo-tokens.svg"
    first = path.read_text()
    list(plots.draw([results_of(cases)], tmp_path))
    assert path.read_text() == first
    assert len(first) < 200_000


def test_points_are_times_memory_and_speedup(monkeypatch):
    drawn = {}

    def keep(ax, series, names, label, value):
        drawn[label] = [[value(x, name) for x in series.cases] for name in names]

    monkeypatch.setattr(plots, "_panel", keep)
    cases = [case("a", {"tokens": 1}), case("b", {"tokens": 2}, (2.0, None), (0, None))]
    with pytest.raises(FileNotFoundError):  # everything but the file
        plots.draw_series(Series("tokens", "demo", cases), Path("no/such/folder/x.svg"))
    assert drawn == {
        "time, ms": [[2000.0, 2000.0], [8000.0, None]],
        "peak memory, MB": [[1.0, None], [4.0, None]],
        "time / time of flexjag plan": [[None, None], [4.0, None]],
    }


def test_runs_of_the_same_device_do_not_overwrite_each_other(tmp_path):
    one = results_of(growing("docs", "tokens", (1, 2, 3)))
    paths = [path.name for _, _, path, _ in plots.draw([one, one], tmp_path)]
    assert paths == ["cpu-demo-tokens.svg", "cpu-demo-tokens-2.svg"]


def test_nothing_measured_is_still_a_picture(tmp_path):
    cases = [case(f"docs, {n} tokens", {"tokens": n}, (None, None), (None, None)) for n in (1, 2, 3)]
    plots.draw_series(Series("tokens", "docs", cases), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_page_has_its_pictures_and_what_was_cut():
    cases = [case("docs, 5 tokens", {"tokens": 5}, cut="ended early: no time"), case("late", {}, cut="not begun")]
    cases[1]["arms"] = []
    results = results_of(cases)
    results["suites"][0]["cut"] = "1 of 2 cases had no time for all of it"
    page = to_markdown([results], [Picture(0, "demo", "images/x.svg", "docs | all"), Picture(1, "demo", "y.svg", "")])
    assert "![docs &#124; all](images/x.svg)" in page
    assert "y.svg" not in page
    assert "**Cut short**: 1 of 2 cases had no time for all of it" in page
    assert "**docs, 5 tokens** (tokens 5) ended early: no time" in page
    assert "**late** () not begun" not in page
    assert "**late** not begun" in page


def test_page_tells_of_tests_and_of_waiting():
    tests = {"counts": {"passed": 3, "failed": 1}, "failures": {"a.py::b": "assert 0"}, "cut": "ended after 9 s"}
    sync = {"passed": False, "detail": "causal: it waited", "steps": 5}
    page = to_markdown([results_of([], tests=tests, sync=sync)])
    assert "Tests that need a GPU: 3 passed, 1 failed. ended after 9 s" in page
    assert "- `a.py::b`: assert 0" in page
    assert "Planning and attention without waiting for the device: failed. causal: it waited" in page


def test_the_documented_command_writes_page_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("docs/results").mkdir(parents=True)
    Path("docs/results/a.json").write_text(json.dumps(results_of(growing("docs", "tokens", (1, 2, 3)))))
    assert main(["report", "docs/results/a.json"]) == 0
    page = Path("docs/performance.md").read_text()
    (link,) = re.findall(r"!\[.*\]\((.*)\)", page)
    assert link == "images/performance/cpu-demo-tokens.svg"
    assert (Path("docs") / link).exists()
    assert main(["report", "docs/results/a.json", "--write", "other/page.md"]) == 0
    assert Path("other/page.md").read_text() == page
    assert (Path("other") / link).exists()
    capsys.readouterr()
    before = sorted(Path().rglob("*"))
    assert main(["report", "docs/results/a.json", "--print"]) == 0
    assert "docs, 3 tokens" in capsys.readouterr().out
    assert sorted(Path().rglob("*")) == before
    assert main(["report", "docs/results/a.json", "--print", "--write", "x.md"]) == 2


def test_page_without_matplotlib_has_no_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "a.json").write_text(json.dumps(results_of(growing("docs", "tokens", (1, 2, 3)))))
    assert main(["report", str(tmp_path / "a.json"), "--write", str(tmp_path / "page.md")]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert "![" not in (tmp_path / "page.md").read_text()


def test_tables_without_rich_are_markdown(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    (tmp_path / "a.json").write_text(json.dumps(results_of(growing("docs", "tokens", (1, 2, 3)))))
    assert main(["report", str(tmp_path / "a.json"), "--print"]) == 0
    assert "| flexjag plan | 100 ms |" in capsys.readouterr().out


def test_pages_pictures_are_there():
    page = (ROOT / "docs" / "performance.md").read_text()
    assert [link for link in re.findall(r"!\[.*\]\((.*)\)", page) if not (ROOT / "docs" / link).exists()] == []


def test_bench_needs_neither_rich_nor_matplotlib_to_start():
    code = "import sys; sys.modules['rich'] = sys.modules['matplotlib'] = None; from flexjag.bench import gpu, run, cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
