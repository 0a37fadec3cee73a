"""What is kept on disk: where, how it is replaced, and what goes when it is too much."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexjag import caches
from flexjag.backends.flex import tuning
from flexjag.caches import CACHES
from flexjag.errors import CacheError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEXJAG_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.delenv("FLEXJAG_CACHE_MB", raising=False)
    monkeypatch.delenv("FLEXJAG_TUNING", raising=False)
    return tmp_path / "kept"


def names(cache: str = "kernels") -> list[str]:
    return sorted(path.name for path in CACHES[cache].files())


def store(file: str, size: int, seconds: float) -> None:
    """A file of so many bytes, last used so many seconds after 1970."""
    caches.write("kernels", file, bytes(size))
    path = caches.folder() / "kernels" / file
    if path.exists():
        os.utime(path, (seconds, seconds))


def test_the_folder_is_named_or_in_torchs_own(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    assert caches.folder() == folder
    monkeypatch.setenv("FLEXJAG_CACHE_DIR", "")
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert caches.folder() == tmp_path / "xdg" / "torch" / "flexjag"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    assert caches.folder() == tmp_path / "home" / "flexjag"
    assert not caches.folder().exists(), "it is made when something is kept"


def test_every_cache_is_in_the_folder(folder: Path) -> None:
    caches.write("kernels", "a", b"1")
    tuning.write(tuning.path(), [])
    found = [path for cache in CACHES.values() for path in cache.files()]
    assert sorted(found) == sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(found) == 2


def test_what_is_written_is_read_and_replaced() -> None:
    with pytest.raises(FileNotFoundError):
        caches.read("kernels", "a")
    for data in (b"one", b"two"):
        caches.write("kernels", "a", data)
        assert caches.read("kernels", "a") == data
    assert names() == ["a"]


def test_what_fails_leaves_nothing_and_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    caches.write("kernels", "a", b"old")

    def fails(*paths: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(caches.os, "replace", fails)
    with pytest.raises(PermissionError):
        caches.write("kernels", "a", b"new")
    assert names() == ["a"]
    assert caches.read("kernels", "a") == b"old"


def test_the_least_recently_used_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXJAG_CACHE_MB", "0.001")
    for i, file in enumerate("abc"):
        store(file, 300, i)
    caches.read("kernels", "a")  # now the last one used
    store("d", 300, 3)
    assert names() == ["a", "c", "d"]
    caches.write("kernels", "e", bytes(800))
    assert names() == ["e"]
    caches.write("kernels", "f", bytes(1001))
    assert names() == [], "nothing larger than the limit stays"


def test_what_was_measured_stays_whatever_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.write(tuning.path(), [])
    monkeypatch.setenv("FLEXJAG_CACHE_MB", "0")
    store("a", 1, 0)
    assert (names(), names("tuning")) == ([], ["tuning.json"])


@pytest.mark.parametrize("given", ["-1", "much", "nan"])
def test_a_limit_that_is_no_number_is_told(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("FLEXJAG_CACHE_MB", given)
    with pytest.raises(CacheError, match="FLEXJAG_CACHE_MB: must be a number of MB, 0 or more"):
        caches.write("kernels", "a", b"1")
    assert names() == []


def test_files_that_others_remove_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    caches.write("kernels", "a", b"1")
    gone = caches.folder() / "kernels" / "gone"
    monkeypatch.setattr(caches.Cache, "files", lambda self: [gone])
    caches.write("kernels", "b", b"1")
    assert caches.clear("kernels") == 0
