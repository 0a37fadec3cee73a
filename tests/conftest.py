"""Hypothesis budgets, seeds, and which tests need a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Drawing a problem takes milliseconds; the first one also imports half of torch.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("dev", max_examples=20, **COMMON)
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


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
