"""The kernels of the backend ``cpp`` under the address and undefined-behaviour sanitizers, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cpp_cases import STRUCTURES

from flexjag.kernels.cpp import build

FLAGS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

RUN = """
import sys
import torch
from flexjag.kernels.cpp import build
build.FLAGS = tuple([y for x in build.FLAGS for y in ({flags} if x == "-O3" else (x,))])
{body}
"""

OVERRUN = """
import flexjag as fj
from flexjag.backends.cpp import library
library._rows = lambda x, rows=library._rows: library._Rows(x.data_ptr() + x.element_size(), x.stride(0), x.stride(1))
x = fj.Jagged.from_lengths(torch.randn(20, 1, 16), [20])
fj.attention(x, x, x, backend="cpp")
"""


OPS = """
from flexjag import Jagged, ops
from flexjag.ops.cpp import common, softmax
common.ENOUGH, common.LEAST, softmax.FEW = 0, 0, 1
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for lengths in ([0, 1, 97, 0], [200, 3], []):
        s, t, longest = len(lengths), sum(lengths), max(lengths, default=0)
        for n in (1, 3, 8, 16, 17, 64, 70):
            x, y = (Jagged.from_lengths(torch.randn(t, n, dtype=dtype), lengths).requires_grad_() for _ in range(2))
            ops.jagged_softmax(x).values.sum().backward()
            for m in (1, 5, 16, 50):
                query, bias = (torch.randn(s, *z, dtype=dtype).requires_grad_() for z in ((m, n), (longest, m)))
                ops.jagged_dense_attention(query, x, y, bias).sum().backward()
print(sum("ops/cpp" in x for x in common.build._state.loaded))
"""


def _libraries() -> list[str]:
    """Paths of the compiler's sanitizer libraries; empty if it has none."""
    if build.refusal() is not None:
        return []
    command = build.describe()["compiler"].split()
    found = []
    for name in ("libasan.so", "libubsan.so"):
        done = subprocess.run([*command, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        found.append(done.stdout.strip())
    return found if all(Path(x).is_absolute() and Path(x).exists() for x in found) else []


def _sanitized(body: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code after which kernels are compiled for the sanitizers."""
    libraries = _libraries()
    if not libraries:
        pytest.skip("the compiler has no sanitizers as shared libraries")
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "FLEXJAG_CACHE_DIR": str(folder),
        "PYTHONPATH": path,
    }
    code = RUN.format(flags=FLAGS, body=body)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


@pytest.mark.slow
def test_the_sanitizer_sees_an_overrun(tmp_path: Path) -> None:
    done = _sanitized(OVERRUN, tmp_path)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURES)
def test_nothing_is_read_or_written_out_of_bounds(name: str, tmp_path: Path) -> None:
    done = _sanitized(f"import cpp_cases\nprint(cpp_cases.run_all(({name!r},)))", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) > 0


@pytest.mark.slow
def test_ops_read_and_write_nothing_out_of_bounds(tmp_path: Path) -> None:
    done = _sanitized(OPS, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) == 8
