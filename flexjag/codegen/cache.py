"""Results of ``compile_for`` kept on disk, by everything they depend on."""

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
    """A name for what these parts, the versions and the caller's own code determine."""
    text = repr((parts, versions(), _own_modules()))
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _source_digest() -> str:
    """A hash of flexjag's own source, which changes between releases, too."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _own_modules() -> list[tuple[str, int, int]]:
    """The caller's loaded modules that are installed nowhere, with time and size.

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
    """What was stored under a key, or None. An entry that cannot be read is as good as none.

    Raises:
        CacheError: If ``FLEXJAG_CACHE_MB`` is no number, which :func:`store` would say after the long part.
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
    """Keep a value. A folder that cannot be written to is no error: the result is there all the same."""
    with contextlib.suppress(OSError):
        caches.write("kernels", f"{name}.pkl.z", zlib.compress(pickle.dumps(value)))
