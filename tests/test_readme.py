"""The README's example runs as printed, its links lead somewhere, and its table shows what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

import flexjag as fj
from flexjag.backends.choose import BACKENDS
from flexjag.bench.arms.attention import LOOP, PADDED, SHARED
from flexjag.kernels.cpp import build

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_and_is_right() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, object] = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    q, k, v, out = (names[n] for n in ("q", "k", "v", "out"))
    wanted = fj.attention(q, k, v, mask=names["mask"], score=names["score"], backend="reference")
    torch.testing.assert_close(out.values, wanted.values, rtol=1e-5, atol=1e-5)  # float32, at most 68 keys a row
    assert q.values.grad is not None


def run_page(page: str) -> dict[str, Any]:
    """Run the Python of a page as one module, and return its names."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL))
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(code, page, "exec", dont_inherit=True), names)
    return names


def test_the_example_of_a_node_runs() -> None:
    run_page("docs/extending.md")


def test_positions_run_as_printed() -> None:
    run_page("docs/positions.md")


def test_sinks_and_dropout_run_as_printed() -> None:
    run_page("docs/weights.md")


def test_the_page_on_decoding_runs_as_printed() -> None:
    names = run_page("docs/decoding.md")
    assert [len(x) for x in names["answers"]] == names["lengths"]
    assert names["cache"].num_segments == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")  # of PyTorch's own export
def test_the_page_on_graphs_runs() -> None:
    run_page("docs/compile.md")


@pytest.mark.skipif(build.refusal() is not None, reason=str(build.refusal()))
def test_the_example_of_the_cpu_page_runs_and_is_right() -> None:
    names = run_page("docs/cpu.md")
    wanted = fj.attention(*(names[x] for x in "qkv"), plan=names["plan"], backend="reference")
    torch.testing.assert_close(names["out"].values, wanted.values, rtol=1e-5, atol=1e-5)  # float32, at most 133 keys
    assert names["q"].values.grad is not None


def test_the_examples_of_the_page_on_data_run() -> None:
    names = run_page("docs/data.md")
    assert names["loss"].isfinite()
    assert names["embed"].weight.grad is not None
    assert names["resumed"].epoch == names["state"]["epoch"]


def test_the_example_of_the_triton_page_runs_and_is_right() -> None:
    names = run_page("docs/triton.md")
    wanted = fj.attention(*(names[x] for x in "qkv"), plan=names["plan"], backend="reference")
    torch.testing.assert_close(names["out"].values, wanted.values, rtol=1e-5, atol=1e-5)  # float32, at most 21 keys
    assert names["q"].values.grad is not None


PAGES = [
    "README.md",
    "docs/design.md",
    "docs/compile.md",
    "docs/cpu.md",
    "docs/data.md",
    "docs/decoding.md",
    "docs/triton.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_exist(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (path.parent / link).exists(), link


def test_the_table_of_backends_is_that_of_their_records() -> None:
    said = {"everywhere": "yes", "on CUDA": "on CUDA", "on CPU": "on CPU", "nowhere": "no", True: "yes", False: "no"}
    lines = []
    for name, backend in BACKENDS.items():
        p = backend.promises
        lse = said[p.lse] if p.lse_gradient else "without gradient"
        can = (p.untraceable is None, p.second_order, p.contains_nan, p.unmixed, p.deterministic)
        cells = [f"`{name}`", backend.title, backend.takes, said[p.gradients], lse, *(said[x] for x in can)]
        lines.append(f"| {' | '.join(cells)} |")
    table = re.search(r"^\| backend \|.*?\n\n", TEXT, re.MULTILINE | re.DOTALL)
    assert table is not None
    assert table[0].rstrip().split("\n")[2:] == lines


def newest_result(suite: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The arms of each case in the newest file of results that has the suite, with a thread for each core."""
    files = sorted((ROOT / "docs/results").glob("cpu-*.json"), reverse=True)
    runs = (json.loads(f.read_text(encoding="utf-8")) for f in files)
    whole = (run for run in runs if run["environment"]["threads"] == run["environment"]["cores"])
    suites = (s for run in whole for s in run["suites"] if s["name"] == suite)
    return {case["name"]: {arm["name"]: arm for arm in case["arms"]} for case in next(suites)["cases"]}


COLUMNS = {
    "`cpp`": ["flexjag cpp"],
    "with planning": ["flexjag cpp, planning included"],
    "`segments`": ["flexjag segments"],
    "SDPA loop": [LOOP],
    "padded SDPA": [PADDED, SHARED],  # the faster one
}
ROWS = {
    "causal, forward": "causal, forward, log-normal",
    "causal, forward + backward": "causal, forward + backward, log-normal",
    "the same in bfloat16": "causal, forward + backward, log-normal, bfloat16",
    r"`Window(128, 0) \| Prefix(4)`, ALiBi, forward + backward": "window | prefix + ALiBi, forward + backward, "
    "log-normal",
    "causal, trained relative bias, forward + backward": "causal + trained relative bias, forward + backward, "
    "log-normal",
    "HSTU with trained biases, forward + backward": "HSTU attention, learned bias, forward + backward",
}


def test_the_table_of_times_is_that_of_the_newest_results() -> None:
    cases = newest_result("cpp")
    table = re.search(r"^\| 48 segments, plan ready.*?\n\n", TEXT, re.MULTILINE | re.DOTALL)
    assert table is not None
    header, _, *lines = ([cell.strip() for cell in re.split(r"(?<!\\)\|", x)[1:-1]] for x in table[0].split("\n")[:-2])
    assert [line[0] for line in lines] == list(ROWS)
    assert header[1:] == list(COLUMNS)
    for name, *cells in lines:
        arms = cases[ROWS[name]]
        for column, cell in zip(header[1:], cells, strict=True):
            found = [arms[arm] for arm in COLUMNS[column] if arm in arms and arms[arm]["status"] == "ok"]
            taken = min((median(arm["seconds"]) * 1e3 for arm in found), default=None)
            assert cell == ("" if taken is None else f"{taken:.1f} ms" if taken < 100 else f"{taken:.0f} ms")
