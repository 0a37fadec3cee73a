"""``flexjag cache`` shows what is kept and removes what it is told to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexjag import caches
from flexjag.__main__ import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEXJAG_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.delenv("FLEXJAG_CACHE_MB", raising=False)
    caches.write("kernels", "a", bytes(3000))
    caches.write("kernels", "b", bytes(2000))
    (tmp_path / "kept" / "tuning.json").write_text("{}")
    return tmp_path / "kept"


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_it_shows_what_is_there_and_changes_nothing(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main(["cache"]) == 0
    where, kernels, cpp, tuning = capsys.readouterr().out.splitlines()
    assert where == str(folder)
    assert " ".join(kernels.split()) == "kernels 2 files, 5 kB of at most 512 MB: results of compile_for"
    assert cpp.split()[:4] == ["cpp", "0", "files,", "0"]
    assert tuning.split()[:4] == ["tuning", "1", "file,", "0"]
    assert left(folder) == ["a", "b", "tuning.json"]


@pytest.mark.parametrize(
    ("named", "removed", "rest"),
    [([], 2, ["tuning.json"]), (["tuning"], 1, ["a", "b"]), (["kernels", "tuning"], 3, [])],
    ids=str,
)
def test_it_removes_what_is_named_and_else_what_can_be_made_again(capsys, folder, named, removed, rest) -> None:
    assert main(["cache", "--json", "--clear", *named]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["removed"], printed["folder"]) == (removed, str(folder))
    assert left(folder) == rest
    assert sum(x["files"] for x in printed["caches"].values()) == len(rest)


def test_an_empty_or_absent_folder_is_shown_too(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FLEXJAG_CACHE_DIR", str(tmp_path / "nothing"))
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out.startswith(f"removed 0 files\n{tmp_path / 'nothing'}\n")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("arguments", "limit", "message"),
    [(["--clear", "everything"], "", "invalid choice: 'everything'"), ([], "much", "must be a number of MB")],
)
def test_wrong_use_is_one_line(capsys, monkeypatch, arguments, limit, message) -> None:
    monkeypatch.setenv("FLEXJAG_CACHE_MB", limit)
    assert main(["cache", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
