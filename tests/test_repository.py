"""What is written twice says the same: README, the tasks, CI, the hooks, and the pages of decisions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DECISIONS = sorted((ROOT / "docs/decisions").glob("*.md"))


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def task(name: str) -> str:
    """The one command of a task."""
    found = re.search(rf"^{name}:\n    (.*)\n(?!    )", read("justfile"), re.MULTILINE)
    assert found is not None, name
    return found[1]


def tasks() -> set[str]:
    return set(re.findall(r"^([\w-]+):$", read("justfile"), re.MULTILINE))


def test_readme_runs_the_first_tasks() -> None:
    assert f"\n{task('install')} && {task('test')}\n" in read("README.md")


def test_ci_calls_tasks_and_holds_no_command_of_its_own() -> None:
    script = read(".ci/run")
    called = re.search(r"^for task in (.*); do$", script, re.MULTILINE)
    assert called is not None
    assert called[1].split()[:2] == ["install", "test"]
    assert set(called[1].split()) <= tasks()
    assert not re.search(r"^\s*(pytest|ruff|pyright|mypy|lint-imports|jupyter)\b", script, re.MULTILINE)


def test_hooks_are_tasks_that_ci_calls() -> None:
    entries = re.findall(r"^\s+entry: just (\S+)$", read(".pre-commit-config.yaml"), re.MULTILINE)
    assert set(entries) == {"lint", "types", "imports"}
    assert set(entries) <= tasks()


def test_contributing_names_tasks_that_exist() -> None:
    assert set(re.findall(r"`just ([a-z][a-z-]*)`", read("CONTRIBUTING.md"))) <= tasks()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "docs/decisions/README.md"])
def test_relative_links_exist(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", read(page)):
        assert ((ROOT / page).parent / link).exists(), link


FORM = re.compile(
    r"# [^\n]+\n\n\*\*Decision\.\*\* .+?\n\n\*\*Why\.\*\* .+?\n\n\*\*Measured\.\*\* .+?\n\n"
    r"\*\*Date\.\*\* \d{4}-\d\d-\d\d \([0-9a-f]{7,}\)\n",
    re.DOTALL,
)


def test_every_decision_has_the_form_and_a_line_in_the_index() -> None:
    index = dict(re.findall(r"^- \[(.*)\]\((.*)\)$", read("docs/decisions/README.md"), re.MULTILINE))
    pages = [page for page in DECISIONS if page.name != "README.md"]
    assert {page.name: page.read_text(encoding="utf-8").split("\n")[0].removeprefix("# ") for page in pages} == {
        name: title for title, name in index.items()
    }
    for page in pages:
        assert FORM.fullmatch(page.read_text(encoding="utf-8")), page.name
