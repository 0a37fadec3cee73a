"""What needs an extra says so, and each extra brings what is asked of it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import flexjag as fj
from flexjag import testing
from flexjag.__main__ import main
from flexjag.cli import options as cli_tools
from flexjag.codegen.payload import pack
from flexjag.errors import MissingExtraError
from flexjag.extras import needs

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {"pynvml": "nvidia-ml-py"}


def packages(extra: str) -> set[str]:
    """The names of what an extra installs, other extras resolved."""
    found = set()
    for wanted in PROJECT["optional-dependencies"][extra]:
        inner = re.fullmatch(r"flexjag\[(.+)\]", wanted)
        found |= set().union(*map(packages, inner[1].split(","))) if inner else {re.match(r"[\w-]+", wanted)[0]}
    return found


def asked() -> list[tuple[str, str, str]]:
    """File, extra and module of every call of `needs` in the package."""
    found = []
    for file in sorted((ROOT / "flexjag").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "needs":
                extra, *modules = (ast.literal_eval(x) for x in node.args)
                found += [(file.name, extra, module) for module in modules]
    return found


def test_each_extra_brings_what_is_asked_of_it_and_all_brings_everything() -> None:
    assert {extra for _, extra, _ in asked()} == {"pictures", "progress", "codegen", "bench", "testing"}
    for file, extra, module in asked():
        assert DISTRIBUTIONS.get(module, module) in packages(extra) & packages("all"), (file, extra, module)


def test_the_base_is_small() -> None:
    names = [re.match(r"[\w-]+", x)[0] for x in PROJECT["dependencies"]]
    assert names == ["torch", "triton", "attn-gym", "numpy"]


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def test_a_picture_and_a_pickle_name_their_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = fj.plan(fj.Jagged.from_lengths(torch.zeros(5, 1, 16), [2, 3]))
    without(monkeypatch, "matplotlib", "cloudpickle")
    with pytest.raises(MissingExtraError, match=r"matplotlib is not installed: pip install 'flexjag\[pictures\]'"):
        fj.plan(fj.Jagged.from_lengths(torch.zeros(5, 1, 16), [2, 3])).show()
    with pytest.raises(ImportError, match=r"cloudpickle is not installed: pip install 'flexjag\[codegen\]'"):
        pack(plan)


def test_the_strategies_name_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "hypothesis")
    with pytest.raises(MissingExtraError, match=r"pip install 'flexjag\[testing\]'"):
        testing.masks  # noqa: B018


@pytest.mark.parametrize(("module", "extra"), [("matplotlib", "pictures"), ("rich", "progress")])
def test_the_demo_names_its_extras_before_it_works(monkeypatch, capsys, module: str, extra: str) -> None:
    without(monkeypatch, module)
    assert main(["demo", "/nowhere"]) == 2
    assert capsys.readouterr().err == f"flexjag: {module} is not installed: pip install 'flexjag[{extra}]'\n"


def test_without_rich_progress_is_lines_on_a_terminal_too(monkeypatch, capsys) -> None:
    without(monkeypatch, "rich", "rich.console", "rich.progress")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(cli_tools, "PATIENCE", 60.0)
    with cli_tools.progress(1, quiet=False) as say:
        say("quick")
    assert capsys.readouterr() == ("", "")
    assert main(["explain", "--lengths", "3,4"]) == 0


def test_a_package_that_is_there_but_lacks_something_is_not_called_missing(tmp_path, monkeypatch) -> None:
    (tmp_path / "half_there.py").write_text("import what_it_lacks")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="what_it_lacks") as caught:
        needs("pictures", "half_there")
    assert not isinstance(caught.value, MissingExtraError)
