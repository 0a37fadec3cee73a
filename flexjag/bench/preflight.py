"""What a run of ``flexjag bench gpu`` needs on a machine, looked up before anything runs: packages and a C compiler."""

from __future__ import annotations

import ast
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
OPTIONAL = {
    "attn_gym": "no arms of attention-gym",
    "rich": "no bars and tables, but lines",
    "matplotlib": "no pictures on the page",
    "cloudpickle": "tests of compile_for are skipped",
    "fbgemm_gpu": "no arms of FBGEMM in ops",
    "pynvml": "no energy, and no version of the driver",
    "transformers": "no tests against its tables",
    "torchdata": "no tests with its loaders",
    "datasets": "no tests with its datasets",
    "xdist": "tests run one at a time",
    "hypothesis": "no tests",
}
"""Packages that can be missing, and what that costs."""
TESTS = ("pytest", "hypothesis")
COMPILERS = ("cc", "gcc", "clang")


@dataclass(frozen=True)
class Found:
    """What is missing.

    Attributes:
        needed: What the stages cannot do without, with reasons.
        absent: Names of missing optional packages.
    """

    needed: list[str]
    absent: list[str]

    def __str__(self) -> str:
        costs = "; ".join(f"{name} ({OPTIONAL[name]})" for name in self.absent) or "nothing"
        needed = f"; missing and NEEDED: {'; '.join(self.needed)}" if self.needed else ""
        return f"preflight: missing but optional: {costs}{needed}"


def look(stages: Sequence[str], device: str | None, tests: Iterable[Path]) -> Found:
    """Look for every package that the package's files, and the tests to be run, import anywhere.

    Args:
        stages: Names of the stages to be run.
        device: ``"cuda"`` or ``"cpu"``.
        tests: Files and folders of tests.
    """
    needed = _imports(PACKAGE.rglob("*.py")) - set(OPTIONAL)
    if device != "cuda":
        needed.discard("triton")
    if "tests" not in stages:
        needed -= set(TESTS)
    else:
        needed |= set(TESTS)
        files = [file for place in tests for file in ([place] if place.is_file() else place.rglob("*.py"))]
        files += [file for place in tests for file in _fixtures(place)]
        own = {file.stem for file in files} | {folder.name for file in files for folder in file.parents}
        own |= {other.stem for folder in {file.parent for file in files} for other in folder.glob("*.py")}
        needed |= _imports(files) - set(OPTIONAL) - own
    missing = [f"{name} is not installed" for name in sorted(needed) if not installed(name)]
    if device == "cuda":
        missing += _compiler()
    return Found(missing, [name for name in OPTIONAL if not installed(name) and name not in needed])


def installed(name: str) -> bool:
    """Whether a module can be found."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # a module that is blocked, or half of one
        return False


def _fixtures(place: Path) -> Iterator[Path]:
    """The conftest.py files above a place that pytest reads, up to the folder ``tests``."""
    for folder in place.resolve().parents:
        if (folder / "conftest.py").exists():
            yield folder / "conftest.py"
        if folder.name == "tests":
            return


def _imports(files: Iterable[Path]) -> set[str]:
    """Top-level names of all modules imported anywhere in some files, but for Python's own and this package."""
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {PACKAGE.name}


def _compiler() -> list[str]:
    """What Triton lacks to build its launchers: a C compiler, and Python's headers."""
    lacking = []
    if not os.environ.get("CC") and not any(map(shutil.which, COMPILERS)):
        lacking.append(f"a C compiler ({', '.join(COMPILERS)}), which Triton calls")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.exists():
        lacking.append("Python.h, which Triton includes")
    return lacking
