"""Units that the tests of the build compile, a cache of their own, and interpreters that know both."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from flexjag.kernels.cpp import build

ANSWER = 'extern "C" int answer() { return 42; }\n'

COUNT = """\
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
static void one(void* count) { __atomic_fetch_add(static_cast<int*>(count), 1, __ATOMIC_RELAXED); }
extern "C" int count(unsigned threads) {
  int n = 0;
  if (threads > 1) GOMP_parallel(one, &n, threads, 0); else one(&n);
  return n;
}
"""


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a process that has built nothing."""
    monkeypatch.setenv("FLEXJAG_CACHE_DIR", str(tmp_path / "kept"))
    for name in ("FLEXJAG_CACHE_MB", "FLEXJAG_CPP", "CXX"):
        monkeypatch.delenv(name, raising=False)
    forget(monkeypatch)
    return tmp_path / "kept" / "cpp"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_state", build._State())


def program(path: Path, script: str) -> str:
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return str(path)


def files(folder: Path, besides: str = build.TRIAL) -> list[Path]:
    """The kept libraries, but that of the trial."""
    compiler = build._compiler()
    assert isinstance(compiler, build.Compiler)
    return [path for path in folder.iterdir() if path.stem != build._key(compiler, besides)]


def run(code: str, first: str = "") -> str:
    """Run code in a fresh interpreter, after what is to be `first`, and return what it prints."""
    code = textwrap.dedent(first) + preamble(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def preamble(code: str) -> str:
    """Code after what it imports, and the units above."""
    imports = "import ctypes, os, sys, threading, torch\nfrom flexjag.kernels.cpp import build, openmp\n"
    return f"{imports}ANSWER, COUNT = {ANSWER!r}, {COUNT!r}\n{textwrap.dedent(code)}"
