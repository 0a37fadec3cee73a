"""CPU kernels are built by several threads and processes at once, and share torch's threads."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cpp_units import ANSWER, files, own_folder, preamble, program, run

from flexjag.kernels.cpp import build

folder = own_folder

pytestmark = [
    pytest.mark.usefixtures("folder"),
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux, as kernels do"),
]


def test_threads_that_ask_at_once_get_one_library(monkeypatch) -> None:
    built, compile = [], build._built
    monkeypatch.setattr(build, "_built", lambda *args: built.append(args) or compile(*args))
    found: list[ctypes.CDLL] = []
    asking = [threading.Thread(target=lambda: found.append(build.load(ANSWER))) for _ in range(4)]
    for one in asking:
        one.start()
    for one in asking:
        one.join()
    assert len(found) == 4
    assert len({id(one) for one in found}) == 1
    assert len(built) == 2  # the trial is the other


def test_kernels_run_on_the_threads_of_torch() -> None:
    """The number is torch's; there is no second runtime; and the pool is the one that torch started."""
    assert run("""
        def runtimes():
            with open("/proc/self/maps") as maps:
                return {line.split()[-1] for line in maps if "omp" in line.split()[-1]}
        before = runtimes()
        torch.set_num_threads(3)
        torch.ones(1 << 20).exp_()  # torch starts its threads
        pool = set(os.listdir("/proc/self/task"))
        count = build.load(COUNT).count
        print([count(n) for n in (3, 1)], openmp.threads())
        assert set(os.listdir("/proc/self/task")) == pool
        print(count(2))
        assert runtimes() == before and len(before) == 1, before
        torch.set_num_threads(1)
        print(openmp.threads())
    """).splitlines() == ["[3, 1] 3", "2", "1"]


def test_a_runtime_that_torch_keeps_to_itself_is_found() -> None:
    """Some builds of torch load it without showing its symbols to libraries loaded later."""
    hidden = """
        import ctypes
        CDLL = ctypes.CDLL
        ctypes.CDLL = lambda name, mode=0, **rest: CDLL(name, 0, **rest)
        import torch
        ctypes.CDLL = CDLL
        print(hasattr(CDLL(None), "GOMP_parallel"))
    """
    assert run("print(build.load(COUNT).count(2))", first=hidden) == "False\n2\n"


def test_a_forked_process_builds_and_runs() -> None:
    """The parent has run on two threads, and another of its threads is compiling when it forks."""
    assert run("""
        torch.set_num_threads(2)
        print(build.load(COUNT).count(openmp.threads()), flush=True)
        compiling = threading.Event()
        def hold():
            with build._state.lock:
                compiling.set()
                threading.Event().wait(100)
        threading.Thread(target=hold, daemon=True).start()
        compiling.wait()
        child = os.fork()
        if child == 0:
            print(build.load(COUNT).count(openmp.threads()), build.load(ANSWER).answer(), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """).split() == ["2", "1", "42"]


@pytest.mark.slow
def test_two_processes_may_build_the_same_at_once(folder: Path) -> None:
    code = preamble("sys.stdin.readline(); print(build.load(ANSWER).answer(), flush=True)")
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for one in both:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    assert [one.communicate(timeout=100)[0].strip() for one in both] == ["42", "42"]
    assert len(files(folder)) == 1


def test_a_killed_build_leaves_nothing_that_is_taken_for_a_library(folder: Path, monkeypatch, tmp_path: Path) -> None:
    """The compiler writes half a library and then hangs; its process is killed."""
    assert build.refusal() is None  # the trial is kept
    begun = tmp_path / "begun"
    script = f"""
    for last; do :; done
    case $* in *-dM*) exec g++ "$@";; esac
    printf '\\177ELF' > "$last"; touch {begun}; exec sleep 100
    """
    monkeypatch.setenv("CXX", program(tmp_path / "cxx", script))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    one = subprocess.Popen([sys.executable, "-c", preamble("build.load(ANSWER)")], start_new_session=True)
    try:
        while not begun.exists():
            assert one.poll() is None
            time.sleep(0.02)
    finally:
        os.killpg(one.pid, signal.SIGKILL)
        one.wait()
    assert files(folder) == []
    monkeypatch.delenv("CXX")
    assert build.load(ANSWER).answer() == 42
