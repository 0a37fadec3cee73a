"""The C++ compiler of this machine, and what it compiled: kept on disk, loaded once.

A unit is the text of one file of C++17, which may include the package's headers and the standard library. It is
compiled for the CPU of this machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from flexjag import caches
from flexjag.errors import BackendError, BuildError
from flexjag.kernels.cpp import openmp

SWITCH = "FLEXJAG_CPP"
"""Environment variable that turns C++ kernels off, if it is 0."""

HEADERS = Path(__file__).parents[2]
"""Folder of the package. Units include its headers by their paths in it, such as ``#include "kernels/cpp/lanes.h"``."""

FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native" if platform.machine() in ("x86_64", "i686") else "-mcpu=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",  # as g++ does anyway
    "-fPIC",
    "-shared",
    "-Wl,--as-needed",
)

OLDEST = {"g++": 9, "clang": 12}
"""First major version of each compiler that units are written for."""

TRIAL = """\
#include <algorithm>
#include <cmath>
#include <cstdint>
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
extern "C" void trial(void (*body)(void*), void* data, unsigned threads) { GOMP_parallel(body, data, threads, 0); }
"""
"""Unit that a compiler must compile and this process load before any other: compilers come without headers or linker,
and folders without the right to execute."""

_SEAL = hashlib.sha256().digest_size

_log = logging.getLogger("flexjag")


@dataclass(frozen=True)
class Compiler:
    """A compiler that works.

    Attributes:
        command: Program, and arguments that come first.
        version: Name and version, such as ``"g++ 12.2.0"``.
        macros: Hash of the macros that it predefines: they name its version, the flags and the CPU's features.
    """

    command: tuple[str, ...]
    version: str
    macros: str


class _State:
    """What this process knows."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.compilers: dict[tuple[str | None, ...], Compiler | str] = {}  # by environment; text is a refusal
        self.loaded: dict[str, ctypes.CDLL] = {}  # by unit
        self.failed: dict[tuple[Compiler, str], str] = {}  # messages by compiler and unit
        self.told = False


_state = _State()


def _after_fork() -> None:
    _state.lock = threading.RLock()  # a thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def refusal() -> str | None:
    """The reason why no unit can be built here, in one sentence; None if units can be built.

    The first call starts the compiler: for about 10 ms, or 150 ms where it has never been tried. Further
    calls take microseconds while the environment variables ``CXX``, ``PATH`` and ``FLEXJAG_CPP`` stay the same.

    Raises:
        CacheError: As :func:`flexjag.caches.limit`.
    """
    found = _compiler()
    return found if isinstance(found, str) else None


# A graph holds the answer as a constant. The decorator of this name would load Dynamo.
refusal._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def load(text: str) -> ctypes.CDLL:
    """Return the library of a unit: from memory, from disk, or compiled.

    Threads and processes may ask for the same one at once. A file on disk that is damaged or does not load is
    replaced.

    Args:
        text: Text of the unit.

    Raises:
        BackendError: If :func:`refusal` gives a reason.
        BuildError: If the unit does not compile or load. The next call for this unit raises it without trying again.
        CacheError: As :func:`flexjag.caches.limit`.
    """
    found = _state.loaded.get(text)
    if found is not None:
        return found
    compiler = _compiler()
    if isinstance(compiler, str):
        raise BackendError(f"CPU kernels cannot be built: {compiler}")
    with _state.lock:
        if text not in _state.loaded:
            _state.loaded[text] = _library(compiler, text)
        return _state.loaded[text]


def is_built(text: str) -> bool:
    """True if :func:`load` need not compile the unit, unless its file is damaged."""
    if text in _state.loaded:
        return True
    compiler = _compiler()
    return isinstance(compiler, Compiler) and _path(_key(compiler, text)).is_file()


def failure(text: str) -> str | None:
    """The message of the error that :func:`load` raised for this unit in this process; None if it raised none."""
    compiler = _compiler()
    return _state.failed.get((compiler, text)) if isinstance(compiler, Compiler) else None


def describe() -> dict[str, str]:
    """The compiler's command, its version, the flags and the folder of libraries, by these names.

    Raises:
        BackendError: If :func:`refusal` gives a reason.
    """
    compiler = _compiler()
    if isinstance(compiler, str):
        raise BackendError(f"CPU kernels cannot be built: {compiler}")
    command, folder = shlex.join(compiler.command), str(caches.folder() / "cpp")
    return {"compiler": command, "version": compiler.version, "flags": " ".join(FLAGS), "folder": folder}


def _compiler() -> Compiler | str:
    """The compiler, or the reason for a refusal."""
    cxx, path, switch = os.environ.get("CXX"), os.environ.get("PATH"), os.environ.get(SWITCH)
    found = _state.compilers.get((cxx, path, switch))
    if found is not None:
        return found
    with _state.lock:
        found = f"{SWITCH}=0 turns it off" if switch == "0" else _look_for(cxx or "")
        if isinstance(found, Compiler):
            try:
                _library(found, TRIAL)
            except BuildError as error:
                found = str(error)
        _state.compilers[cxx, path, switch] = found
        return found


def _look_for(cxx: str) -> Compiler | str:
    """The compiler that torch.compile takes (``torch._inductor.config.cpp.cxx``): ``$CXX``, else g++; else clang++."""
    if sys.platform != "linux":
        return f"kernels are compiled on Linux only, not on {sys.platform}"
    if not openmp.is_loaded():
        return f"torch has loaded no OpenMP runtime with {openmp.SYMBOL}"
    try:
        asked = [shlex.split(cxx)] if cxx.strip() else [["g++"], ["clang++"]]
    except ValueError as error:
        return f"CXX={cxx!r} is no command: {error}"
    commands = [(os.path.abspath(found), *words[1:]) for words in asked if (found := shutil.which(words[0]))]
    if not commands:
        return (
            f"CXX={cxx!r} is not an installed program" if cxx.strip() else "no C++ compiler is installed (g++, clang++)"
        )
    return _identify(commands[0])


def _identify(command: tuple[str, ...]) -> Compiler | str:
    """Ask a compiler for its version, and for what the flags mean here."""
    try:
        done = _start([*command, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    except OSError as error:
        return f"{command[0]} cannot be started: {error.strerror}"
    if done.returncode != 0:
        return f"{shlex.join(command)} does not take the flags for this CPU: {_first_error(done)}"
    macros = dict(re.findall(r"^#define (\w+) (.*)$", done.stdout, re.MULTILINE))
    name = "clang" if "__clang__" in macros else "g++"
    keys = (
        ("clang_major", "clang_minor", "clang_patchlevel")
        if name == "clang"
        else ("GNUC", "GNUC_MINOR", "GNUC_PATCHLEVEL")
    )
    numbers = [macros.get(f"__{key}__", "") for key in keys]
    if not numbers[0].isdecimal():
        return f"{shlex.join(command)} is neither g++ nor clang"
    version = f"{name} {'.'.join(numbers)}"
    if int(numbers[0]) < OLDEST[name]:
        return f"{command[0]} is {version}, and {name} {OLDEST[name]} or later is needed"
    return Compiler(command, version, hashlib.sha256(done.stdout.encode()).hexdigest())


def _key(compiler: Compiler, text: str) -> str:
    """Hash of everything that a library depends on."""
    found = hashlib.sha256(repr((compiler.version, compiler.macros, FLAGS, text)).encode())
    for name, content in _included(text, HEADERS, {}).items():
        found.update(repr((name, content)).encode())
    return found.hexdigest()


def _included(text: str, folder: Path, found: dict[str, str]) -> dict[str, str]:
    """The texts of the headers that a text in `folder` includes, and that those include, by their paths: `found`.

    As compilers do, it looks in `folder` before it looks in :data:`HEADERS`.
    """
    for name in re.findall(r'^\s*#include "(.+)"', text, re.MULTILINE):
        path = next((path for path in (folder / name, HEADERS / name) if path.is_file()), None)
        if path is not None and (key := path.relative_to(HEADERS).as_posix()) not in found:
            found[key] = path.read_text(encoding="utf-8")
            _included(found[key], path.parent, found)
    return found


def _path(key: str) -> Path:
    return caches.folder() / "cpp" / f"{key}.so"


def _library(compiler: Compiler, text: str) -> ctypes.CDLL:
    if (compiler, text) in _state.failed:
        raise BuildError(_state.failed[compiler, text])
    caches.limit()  # an error of the setting comes before the compilation
    key = _key(compiler, text)
    try:
        return _kept(key) or _built(compiler, text, key)
    except BuildError as error:
        _state.failed[compiler, text] = str(error)
        raise


def _kept(key: str) -> ctypes.CDLL | None:
    """The library on disk; None if there is none, or it is damaged.

    The file ends with a hash of the rest: to load a truncated one could kill the process.
    """
    with contextlib.suppress(OSError):
        data = caches.read("cpp", f"{key}.so")
        if hashlib.sha256(data[:-_SEAL]).digest() == data[-_SEAL:]:
            return ctypes.CDLL(str(_path(key)))
    return None


def _built(compiler: Compiler, text: str, key: str) -> ctypes.CDLL:
    """Compile a unit, write it to disk, and load it: from there, else from where it was compiled."""
    if text != TRIAL:
        _tell("compiling CPU kernels, about 2 s; later calls and processes reuse them")
    try:
        with tempfile.TemporaryDirectory(prefix="flexjag-") as work:
            source, library = Path(work) / "unit.cpp", Path(work) / "unit.so"
            source.write_text(text, encoding="utf-8")
            command = [*compiler.command, *FLAGS, "-iquote", str(HEADERS), str(source), "-o", str(library)]
            done = _start(command, TMPDIR=work)
            if done.returncode != 0:
                error = _first_error(done).replace(f"{work}/", "")
                raise BuildError(f"{compiler.version} cannot compile the CPU kernels: {error}")
            data = library.read_bytes()
            with contextlib.suppress(OSError):
                caches.write("cpp", f"{key}.so", data + hashlib.sha256(data).digest())
                return ctypes.CDLL(str(_path(key)))
            return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(
            f"the CPU kernels that {compiler.version} compiled cannot be kept or loaded: {error}"
        ) from error


def _start(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LC_ALL": "C", **variables}
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=env, check=False
    )


def _first_error(done: subprocess.CompletedProcess[str]) -> str:
    """The first line that tells of an error, else the first line, else the exit status."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    told = [line for line in lines if "error:" in line] or lines
    return told[0] if told else f"exit status {done.returncode}"


def _tell(message: str) -> None:
    """Log a message; where nobody would see that, and IPython runs, print it once."""
    ipython = sys.modules.get("IPython")
    if _log.isEnabledFor(logging.INFO):
        _log.info(message)
    elif not _state.told and ipython is not None and ipython.get_ipython() is not None:
        print(f"flexjag: {message}")
    _state.told = True
