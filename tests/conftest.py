"""Hypothesis budgets, seeds, which tests need a GPU, and which files take the time."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, settings

# Drawing a problem takes milliseconds; the first one also imports half of torch. README's run and CI draw the same
# examples every time; new ones are looked for by the profile "nightly".
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("dev", max_examples=20, derandomize=True, **COMMON)
settings.register_profile("ci", max_examples=150, derandomize=True, **COMMON)
settings.register_profile("nightly", max_examples=1500, **COMMON)
settings.register_profile("find", max_examples=20_000, derandomize=True, **COMMON)  # stops at the first hit
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_configure(config: pytest.Config) -> None:
    # The tensors of the tests are tiny: a second thread only waits, a hundred times as long if the machine is busy.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; torch.cuda.is_available() is False here"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With ``--durations N``, the seconds of the N slowest files, set-up and tear-down included."""
    most = config.getoption("durations")
    if most is None:
        return
    seconds: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                file = report.nodeid.split("::")[0]
                seconds[file] += report.duration
                tests[file] += report.when == "call"
    terminalreporter.section(f"seconds by file, {sum(seconds.values()):.0f} in all")
    for file, spent in seconds.most_common(most or None):
        terminalreporter.write_line(f"{spent:8.1f}  {file} ({tests[file]} tests)")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
