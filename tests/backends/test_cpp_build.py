"""CPU kernels are built by the compiler that is asked for, kept so that nothing broken is loaded, and share threads."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cpp_units import ANSWER, COUNT, files, forget, own_folder, program

from flexjag.errors import BackendError, BuildError, CacheError
from flexjag.kernels.cpp import build, openmp

folder = own_folder

pytestmark = [
    pytest.mark.usefixtures("folder"),
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux, as kernels do"),
]

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
        keys.append(build._key(one, '#include "lanes.h"\n'))
    (tmp_path / "inner").mkdir()
    for content in ("1", "2"):
        (tmp_path / "inner" / "lanes.h").write_text('#include "math.h"\n')  # the one beside it comes first
        (tmp_path / "inner" / "math.h").write_text(content)
        keys.append(build._key(one, '#include "inner/lanes.h"\n'))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    keys.append(build._key(one, '#include "inner/lanes.h"\n'))
    assert len(set(keys)) == len(keys)
    same = build.Compiler(("/b/g++",), "g++ 12.2.0", "0")
    assert build._key(same, '#include "inner/lanes.h"\n') == keys[-1], "its path does not matter"


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
