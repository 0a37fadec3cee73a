"""On-disk cache of ``compile_for``'s results, keyed by everything they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import pickle
import site
import sys
import sysconfig
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flexjag import caches

PACKAGE = Path(caches.__file__).parent


def versions() -> dict[str, str]:
    """Versions of torch and Triton, and a digest of flexjag's source."""
    return {
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__,
        "flexjag": _source_digest(),
    }


def key(*parts: object) -> str:
    """Cache key: a hash of the parts, the versions and the caller's own modules."""
    text = repr((parts, versions(), _own_modules()))
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _source_digest() -> str:
    """Hash of flexjag's own source, which also changes between releases."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _own_modules() -> list[tuple[str, int, int]]:
    """The caller's loaded modules that are not installed packages, with modification time and size.

    Functions in them are pickled by name, so a change of their code would not show otherwise.
    """
    installed = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    installed |= {*site.getsitepackages(), site.getusersitepackages(), str(PACKAGE)}
    found = []
    for name, module in sorted(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if name in ("__main__", "__mp_main__") or not path or not path.endswith(".py"):
            continue
        if any(Path(path).is_relative_to(p) for p in installed):
            continue
        if Path(path).exists():
            seen = Path(path).stat()
            found.append((path, seen.st_mtime_ns, seen.st_size))
    return found


def load(name: str) -> Any | None:
    """Return the value stored under a key; None if there is none or it cannot be read.

    Raises:
        CacheError: If ``FLEXJAG_CACHE_MB`` is not a number. :func:`store` would raise it only after the compilation.
    """
    caches.limit()
    try:
        return pickle.loads(zlib.decompress(caches.read("kernels", f"{name}.pkl.z")))
    except (
        OSError,
        zlib.error,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ImportError,
        LookupError,
        ValueError,
    ):
        return None


def store(name: str, value: Any) -> None:
    """Store a value under a key. A folder that cannot be written to is no error: the caller has the result."""
    with contextlib.suppress(OSError):
        caches.write("kernels", f"{name}.pkl.z", zlib.compress(pickle.dumps(value)))
