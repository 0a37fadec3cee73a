"""flexjag.bench.measuring: peak memory, and what is recorded of a machine."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexjag.bench.measuring import environment, peak
from flexjag.bench.measuring.measure import peak_in_subprocess
from flexjag.bench.suites.registry import Options

QUICK = Options(quick=True, device="cpu", rounds=2, memory=False)


def test_peak_memory_of_a_known_allocation():
    found = peak.measure_peak(lambda: torch.ones(2**25))  # 128 MiB, touched
    if found["method"] == "peak RSS above the RSS before":
        assert 2**27 * 0.95 <= found["bytes"] <= 2**27 * 1.2
    else:
        assert found["bytes"] <= 2**27 * 1.2


AFTER_OTHERS = """
import torch
from flexjag.bench.measuring import peak
if {first}:
    peak.give_back_freed_memory()
for size in range(18, 25):  # 1 to 64 MiB, each freed before the next
    torch.ones(2**size)
kept = [torch.ones(2**21), torch.ones(2**20)]
del kept[0]
print(peak.measure_peak(lambda: torch.ones(2**22))["bytes"])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")
def test_peak_memory_does_not_use_what_others_freed():
    seen = []
    for first in (True, False):
        command = [sys.executable, "-c", AFTER_OTHERS.format(first=first)]
        seen.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert seen[0] >= 2**24 * 0.95  # 16 MiB
    if platform.libc_ver()[0] == "glibc":
        assert seen[1] < seen[0]  # which is why


@pytest.mark.slow
def test_peak_memory_in_a_fresh_process():
    found = peak_in_subprocess("mask-build", "documents, 2,048 tokens", "create_block_mask, eager", QUICK)
    assert found["bytes"] >= 2048**2  # the dense boolean mask alone
    with pytest.raises(RuntimeError, match="exit status"):
        peak_in_subprocess("mask-build", "documents, 2,048 tokens", "no such arm", QUICK)


def test_environment_names_versions_but_neither_host_nor_path():
    facts = environment.describe("cpu")
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert platform.node() not in facts.values()
    text = json.dumps(facts)
    for path in (Path.home(), Path.cwd(), Path(environment.__file__).parent, Path(sys.executable)):
        assert str(path) not in text
