"""CPU kernels are built by the compiler that is asked for, kept so that nothing broken is loaded, and share threads."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexjag.backends.cpp import build, openmp
from flexjag.errors import BackendError, BuildError, CacheError

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux, as the kernels do"
)

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


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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
    imports = "import ctypes, os, sys, threading, torch\nfrom flexjag.backends.cpp import build, openmp\n"
    return f"{imports}ANSWER, COUNT = {ANSWER!r}, {COUNT!r}\n{textwrap.dedent(code)}"


# What is built


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_a_unit_is_built_once_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    monkeypatch.setenv("CXX", compiler)
    assert build.refusal() is None
    assert not build.is_built(ANSWER)
    library = build.load(ANSWER)
    assert library.answer() == 42
    assert build.load(ANSWER) is library
    [kept] = files(folder)
    forget(monkeypatch)
    assert build.is_built(ANSWER)
    monkeypatch.setattr(build, "_built", None)  # a second compilation would fail
    assert build.load(ANSWER).answer() == 42
    assert files(folder) == [kept]


def test_vectors_and_headers_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math.h").write_text("#define TWICE 2\n")  # as a header of C, which must still be found
    monkeypatch.setattr(build, "HEADERS", tmp_path)
    unit = """
    #include <math.h>
    #include "math.h"
    typedef float lanes __attribute__((vector_size(64)));
    extern "C" void twice(float* x) {
      lanes v;
      __builtin_memcpy(&v, x, 64);
      v = v > 2.5f ? v * float(TWICE) : -v;
      __builtin_memcpy(x, &v, 64);
      x[0] = sqrtf(x[0] * x[0]);
    }
    """
    x = torch.arange(1, 17, dtype=torch.float32)
    expected = torch.where(x > 2.5, 2 * x, -x).index_fill(0, torch.tensor([0]), 1.0)
    build.load(unit).twice(ctypes.c_void_p(x.data_ptr()))
    assert torch.equal(x, expected)


def test_the_key_holds_unit_headers_flags_compiler_and_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = build.Compiler(("/a/g++",), "g++ 12.2.0", "0")
    keys = [build._key(one, "x"), build._key(one, "y")]
    keys += [build._key(build.Compiler(("/a/g++",), *rest), "x") for rest in (("g++ 12.3.0", "0"), ("g++ 12.2.0", "1"))]
    monkeypatch.setattr(build, "HEADERS", tmp_path)
    for content in ("1", "2"):
        (tmp_path / "lanes.h").write_text(content)
        keys.append(build._key(one, "x"))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    keys.append(build._key(one, "x"))
    assert len(set(keys)) == len(keys)
    assert build._key(build.Compiler(("/b/g++",), "g++ 12.2.0", "0"), "x") == keys[-1], "its path does not matter"


def test_macros_tell_features_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for flag in ("-march=x86-64", "-march=x86-64-v3") if "-march=native" in build.FLAGS else ("-mcpu=neoverse-n1",):
        monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, flag))
        found = build._identify((str(shutil.which("g++")),))
        assert isinstance(found, build.Compiler)
        seen.append(found.macros)
    assert len(set(seen)) == len(seen)


def test_it_is_described(folder: Path) -> None:
    found = build.describe()
    assert found["compiler"] == shutil.which("g++")
    assert found["version"].startswith("g++ ")
    assert found["flags"].startswith("-std=c++17 -O3 ")
    assert found["folder"] == str(folder)


# What is refused


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, r"^CXX='.*/cxx --fast' is not an installed program$"),
        (
            "echo 'cxx: error: no licence' >&2; exit 3",
            r"/cxx --fast does not take the flags .*: cxx: error: no licence$",
        ),
        ("exit 3", r"does not take the flags for this CPU: exit status 3$"),
        ("echo '#define __GNUC__ 8'", r"/cxx is g\+\+ 8\.\., and g\+\+ 9 or later is needed$"),
        (
            "echo '#define __clang__ 1\n#define __clang_major__ 11\n#define __GNUC__ 4'",
            r"and clang 12 or later is needed$",
        ),
        ("true", r"is neither g\+\+ nor clang$"),
        ("shift; case $* in *-dM*) exec g++ $*;; *) echo 'ld: no crt1.o' >&2; exit 1;; esac", r"ld: no crt1\.o$"),
        ("shift; case $* in *-dM*) exec g++ $*;; esac", r"cannot be kept or loaded: .*No such file"),
    ],
    ids=["missing", "fails", "fails silently", "old g++", "old clang", "other", "no linker", "makes nothing"],
)
def test_a_compiler_that_will_not_do_is_named(monkeypatch, tmp_path: Path, script: str | None, reason: str) -> None:
    cxx = str(tmp_path / "cxx") if script is None else program(tmp_path / "cxx", script)
    monkeypatch.setenv("CXX", f"{cxx} --fast")
    found = build.refusal()
    assert found is not None
    assert re.search(reason, found), found
    assert "\n" not in found
    assert not build.is_built(ANSWER)
    for call in (lambda: build.load(ANSWER), build.describe):
        with pytest.raises(BackendError, match="CPU kernels cannot be built") as told:
            call()
        assert str(told.value).endswith(found)
    monkeypatch.setenv("CXX", "g++")
    assert build.refusal() is None


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("FLEXJAG_CPP", "0", "FLEXJAG_CPP=0 turns it off"),
        ("PATH", "/nowhere", "no C++ compiler is installed (g++, clang++)"),
        ("CXX", "'", 'CXX="\'" is no command: No closing quotation'),
    ],
)
def test_the_environment_is_asked_each_time(monkeypatch, name: str, value: str, reason: str) -> None:
    assert build.refusal() is None
    with monkeypatch.context() as changed:
        changed.setenv(name, value)
        assert build.refusal() == reason
    assert build.refusal() is None


def test_clang_is_taken_where_there_is_no_gcc(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "clang++").symlink_to(str(shutil.which("g++")))
    with monkeypatch.context() as changed:
        changed.setenv("PATH", str(tmp_path))
        changed.setattr(build, "_identify", lambda command: build.Compiler(command, "", ""))
        found = build._look_for("")
    assert isinstance(found, build.Compiler)
    assert found.command == (str(tmp_path / "clang++"),)


def test_other_systems_and_torch_without_openmp_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(openmp, "is_loaded", lambda: False)
    assert build.refusal() == "torch has loaded no OpenMP runtime with GOMP_parallel"
    forget(monkeypatch)
    monkeypatch.setattr(build.sys, "platform", "darwin")
    assert build.refusal() == "kernels are compiled on Linux only, not on darwin"


def test_an_answer_is_remembered(monkeypatch) -> None:
    assert build.refusal() is None
    monkeypatch.setattr(build, "_start", None)
    start = time.perf_counter()
    for _ in range(1000):
        assert build.refusal() is None
    assert time.perf_counter() - start < 0.5  # 3 ms on an idle machine


def test_a_graph_holds_the_answer(monkeypatch) -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def answer(x: torch.Tensor) -> torch.Tensor:
        return x if build.refusal() is None else -x

    assert answer(torch.ones(1)) == 1
    torch._dynamo.reset()
    monkeypatch.setenv("FLEXJAG_CPP", "0")
    assert answer(torch.ones(1)) == -1
    torch._dynamo.reset()


# What fails


def test_a_unit_that_does_not_compile_is_told_in_one_line_and_not_tried_again(folder: Path, monkeypatch) -> None:
    unit = 'int unused;\nextern "C" int f() { return answr; }\n'
    assert build.failure(unit) is None
    expected = (
        r"^g\+\+ \S+ cannot compile the CPU kernels: unit\.cpp:2:\d+: error: .answr. was not declared in this scope"
    )
    with pytest.raises(BuildError, match=expected) as told:
        build.load(unit)
    assert "\n" not in str(told.value)
    assert isinstance(told.value, BackendError)
    assert build.failure(unit) == str(told.value)
    monkeypatch.setattr(build, "_start", None)
    with pytest.raises(BuildError, match=expected):
        build.load(unit)
    assert build.failure(ANSWER) is None
    assert files(folder) == []


def test_a_library_that_lacks_a_symbol_is_an_error() -> None:
    with pytest.raises(BuildError, match=r"compiled cannot be kept or loaded: .*undefined symbol: nowhere"):
        build.load('extern "C" void nowhere(); extern "C" void f() { nowhere(); }')


def test_a_wrong_limit_of_the_cache_is_told_before_anything_is_compiled(monkeypatch) -> None:
    assert build.refusal() is None
    monkeypatch.setenv("FLEXJAG_CACHE_MB", "much")
    monkeypatch.setattr(build, "_start", None)
    with pytest.raises(CacheError, match="FLEXJAG_CACHE_MB"):
        build.load(ANSWER)


# What is kept


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "sealed text"])
def test_a_damaged_file_is_built_again(folder: Path, monkeypatch, tmp_path: Path, damage: str) -> None:
    build.load(ANSWER)
    [kept] = files(folder)
    whole = kept.read_bytes()
    damaged = tmp_path / "other" / "cpp" / kept.name  # not in its place, where it is loaded
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "changed": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
            "empty": b"",
            "sealed text": b"no library" + hashlib.sha256(b"no library").digest(),
        }[damage]
    )
    forget(monkeypatch)
    monkeypatch.setenv("FLEXJAG_CACHE_DIR", str(tmp_path / "other"))
    assert build.load(ANSWER).answer() == 42
    assert damaged.read_bytes() == whole


@pytest.mark.parametrize("why", ["a file in its place", "no room"])
def test_without_a_cache_it_is_built_in_every_process(monkeypatch, tmp_path: Path, why: str) -> None:
    if why == "no room":
        monkeypatch.setenv("FLEXJAG_CACHE_MB", "0")
    else:
        monkeypatch.setenv("FLEXJAG_CACHE_DIR", str(tmp_path / "file"))
        (tmp_path / "file").write_text("")
    library = build.load(ANSWER)
    assert library.answer() == 42
    assert build.load(ANSWER) is library
    forget(monkeypatch)
    assert not build.is_built(ANSWER)


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


# Threads and processes


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


# What is told


def test_a_compilation_is_logged(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO, "flexjag"):
        build.load(ANSWER)
        build.load(ANSWER)
    [record] = caplog.records
    assert record.getMessage() == "compiling CPU kernels, about 2 s; later calls and processes reuse them"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("shell", "lines"), [(None, 0), (object(), 1)], ids=["imported", "running"])
def test_a_notebook_shows_one_line(capsys: pytest.CaptureFixture[str], monkeypatch, shell, lines: int) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    build.load(ANSWER)
    build.load(COUNT)
    out, err = capsys.readouterr()
    assert out == "flexjag: compiling CPU kernels, about 2 s; later calls and processes reuse them\n" * lines
    assert err == ""
