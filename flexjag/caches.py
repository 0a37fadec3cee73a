"""Caches on disk that outlive the process: one folder, named caches in it, and a limit on their size."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from flexjag.errors import CacheError, explain_values

FOLDER, LIMIT = "FLEXJAG_CACHE_DIR", "FLEXJAG_CACHE_MB"
"""Environment variables of the caches' folder, and of the limit of each in MB."""

DEFAULT_MB = 512.0


@dataclass(frozen=True)
class Cache:
    """One cache: a kind of files.

    Attributes:
        about: Description of their contents.
        pattern: Glob that matches them, relative to the folder of all caches.
        limited: True if every file can be made again on request, so that the least recently used are removed above
            the limit. Measurements are not limited: they stay until the cache is cleared by name.
    """

    about: str
    pattern: str
    limited: bool = True

    def files(self) -> list[Path]:
        """Paths of the existing files."""
        return [path for path in folder().glob(self.pattern) if path.is_file()]


CACHES = {
    "kernels": Cache("results of compile_for", "kernels/*"),
    "cpp": Cache("CPU kernels compiled for this machine", "cpp/*"),
    "tuning": Cache("kernel options measured on this machine's GPUs", "tuning.json", limited=False),
}
"""All caches by name."""


def folder() -> Path:
    """Folder of the caches: ``$FLEXJAG_CACHE_DIR``, else ``flexjag`` in PyTorch's own cache folder. It may not exist.

    PyTorch's is ``$TORCH_HOME``, by default ``~/.cache/torch``.
    """
    given = os.environ.get(FOLDER)
    return Path(given) if given else Path(torch.hub.get_dir()).parent / "flexjag"


def limit() -> float:
    """Bytes that each limited cache may take: ``$FLEXJAG_CACHE_MB`` millions, by default 512.

    Raises:
        CacheError: If the variable is not a number, or negative.
    """
    given = os.environ.get(LIMIT, "")
    try:
        millions = float(given) if given.strip() else DEFAULT_MB
    except ValueError:
        millions = -1.0
    if not millions >= 0:
        raise CacheError(explain_values(LIMIT, "must be a number of MB, 0 or more", **{LIMIT: given}))
    return millions * 1e6


def write(name: str, file: str, data: bytes) -> None:
    """Write a file to a cache, replacing it atomically, and trim the cache to its limit.

    Args:
        name: Name of the cache, a key of `CACHES`.
        file: Name of the file.
        data: Contents.

    Raises:
        CacheError: As :func:`limit`.
        OSError: If it cannot be written.
    """
    most = limit()
    path = folder() / name / file
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent)
    try:
        with open(handle, "wb") as out:
            out.write(data)
        os.replace(unfinished, path)
    except BaseException:
        _remove([Path(unfinished)])
        raise
    if CACHES[name].limited:
        _trim(CACHES[name], most)


def read(name: str, file: str) -> bytes:
    """Return the contents of a file in a cache, and mark it as the most recently used.

    Raises:
        OSError: If it does not exist or cannot be read.
    """
    path = folder() / name / file
    data = path.read_bytes()
    with contextlib.suppress(OSError):  # a folder that may only be read
        os.utime(path)
    return data


def clear(*names: str) -> int:
    """Remove all files of the named caches.

    Returns:
        Number of files removed.
    """
    return _remove(path for name in names for path in CACHES[name].files())


def _trim(cache: Cache, most: float) -> None:
    """Remove the least recently used files until the others take at most `most` bytes."""
    found = []
    for path in cache.files():
        with contextlib.suppress(OSError):  # another process removed it
            seen = path.stat()
            found.append((seen.st_mtime_ns, seen.st_size, path))
    taken = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if taken <= most:
            return
        _remove([path])
        taken -= size


def _remove(paths: Iterable[Path]) -> int:
    count = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            count += 1
    return count
