"""What flexjag keeps on disk between processes: one folder, named caches in it, and a limit on their size."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flexjag.errors import CacheError, explain_values

FOLDER, LIMIT = "FLEXJAG_CACHE_DIR", "FLEXJAG_CACHE_MB"
"""The environment variables that say where the caches are, and how many MB each may take."""

DEFAULT_MB = 512.0


@dataclass(frozen=True)
class Cache:
    """One kind of files.

    Attributes:
        about: What they hold, for people.
        pattern: Which they are, a glob from the folder of all caches.
        limited: Each can be made again from what is asked for, so the least recently used go first where there are too
            many. What took measuring stays until it is removed by name.
    """

    about: str
    pattern: str
    limited: bool = True

    def files(self) -> list[Path]:
        """Those there are."""
        return [path for path in folder().glob(self.pattern) if path.is_file()]


CACHES = {
    "kernels": Cache("results of compile_for", "kernels/*"),
    "tuning": Cache("kernel options measured on this machine's GPUs", "tuning.json", limited=False),
}
"""All of them, by name."""


def folder() -> Path:
    """``$FLEXJAG_CACHE_DIR``, else ``flexjag`` where the system keeps a user's caches. It may not exist yet."""
    given = os.environ.get(FOLDER)
    if given:
        return Path(given)
    import platformdirs

    return platformdirs.user_cache_path("flexjag", appauthor=False)


def limit() -> float:
    """Bytes that each limited cache may take: ``$FLEXJAG_CACHE_MB`` millions, by default 512.

    Raises:
        CacheError: If the variable is no number, or under 0.
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
    """Keep a file in a cache, replacing it at once, and bring the cache under its limit.

    Args:
        name: Of the cache, one of `CACHES`.
        file: Of the file.
        data: What it is to hold.

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
    """What a file in a cache holds. It is then the most recently used.

    Raises:
        OSError: If it is not there or cannot be read.
    """
    path = folder() / name / file
    data = path.read_bytes()
    with contextlib.suppress(OSError):  # a folder that may only be read
        os.utime(path)
    return data


def clear(*names: str) -> int:
    """Remove everything in some caches.

    Returns:
        How many files are gone.
    """
    return _remove(path for name in names for path in CACHES[name].files())


def _trim(cache: Cache, most: float) -> None:
    """Remove the least recently used files until the others take at most so many bytes."""
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
