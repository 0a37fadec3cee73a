"""The headers of the CPU kernels compile and compute right with every installed compiler, for other CPUs, too."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from flexjag.backends.cpp.library import unit
from flexjag.kernels.cpp import build
from flexjag.ops.cpp import common

X86 = platform.machine() == "x86_64"
ON_ARM = "qemu-aarch64 -L /usr/aarch64-linux-gnu"

TARGETS = {
    "g++ -march=native": "",
    "clang++ -march=native": "",
    "g++ -march=x86-64-v3": "",
    "g++ -march=x86-64": "",
    "clang++ -march=x86-64-v3": "",
    "aarch64-linux-gnu-g++ -mcpu=neoverse-n1": ON_ARM,
    "clang++ --target=aarch64-linux-gnu -mcpu=neoverse-n1": ON_ARM,
}
"""Compilers and their flags, and what runs the program."""

PARAMETERS = "int32_t h, const Rows& rows, int32_t kv, const void* const* captures, const int64_t* numbers"


def functions(softmax: bool) -> str:
    """What is printed for a causal mask, the score + 1/2, and the softmax or the identity."""
    return f"""
constexpr Normalizer NORMALIZER = Normalizer::{"softmax" if softmax else "pointwise"};
INLINE Lanes<int32_t> mask({PARAMETERS}) {{ return ge(rows.index, kv); }}
INLINE Lanes<real> score(Lanes<real> s, {PARAMETERS}) {{ return s + (real)0.5; }}
INLINE Lanes<real> dscore(Lanes<real> ds, Lanes<real> s, {PARAMETERS}) {{ return ds; }}
INLINE void slopes(Lanes<real> ds, Lanes<real> s, {PARAMETERS}, double* const* totals) {{}}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "sizes", "softmax"),
    [(torch.float32, (64, 64), True), (torch.float64, (50, 20), True), (torch.float32, (50, 20), False)],
    ids=["float32", "float64", "identity"],
)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_are_right_for(tmp_path: Path, target: str, dtype, sizes: tuple[int, int], softmax: bool) -> None:
    compiler, runner = shlex.split(target), shlex.split(TARGETS[target])
    needed = [compiler[0], *runner[:1], *(["aarch64-linux-gnu-g++"] if runner else [])]  # with it come the libraries
    missing = [name for name in needed if not shutil.which(name)]
    if missing or not (runner or X86):
        pytest.skip(f"needs {', '.join(missing) or 'an x86-64 CPU'}")
    check = Path(__file__).with_name("cpp_check.cpp").read_text()
    source, program = tmp_path / "check.cpp", tmp_path / "check"
    source.write_text(unit(functions(softmax), dtype, *sizes) + check)
    flags = [x for x in build.FLAGS if "native" not in x and x != "-shared"]
    command = [*compiler, *flags, "-DWITHOUT_RUNTIME", "-iquote", str(build.HEADERS), str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True, check=True)
    errors = dict(zip(("out", "lse", "dq", "dk", "dv"), map(float, done.stdout.split()), strict=True))
    # Rounding of sums of at most 70 terms, each a product of sums of at most 64: an order of magnitude below.
    assert all(x < 70 for x in errors.values()), errors


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("header", ["softmax", "target"])
@pytest.mark.parametrize("target", TARGETS)
def test_operators_compile_for(tmp_path: Path, target: str, header: str, dtype: torch.dtype) -> None:
    """They use nothing besides the shared headers, which are tested above."""
    compiler = shlex.split(target)
    if not shutil.which(compiler[0]) or ("aarch64" in target and not shutil.which("aarch64-linux-gnu-g++")):
        pytest.skip(f"needs {compiler[0]}")
    source = tmp_path / "unit.cpp"
    source.write_text(common.unit(header, dtype))
    flags = [x for x in build.FLAGS if "native" not in x and x != "-shared" and not x.startswith("-Wl")]
    command = [*compiler, *flags, "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-iquote", str(build.HEADERS)]
    done = subprocess.run([*command, "-c", str(source), "-o", str(tmp_path / "unit.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
