"""The examples of docs/codegen.md run as printed, and its links lead somewhere."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexjag.testing.oracle import Result, Trial, check_against_reference

PAGE = Path(__file__).parents[2] / "docs/codegen.md"
TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLE, TEST = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the first example leaves behind."""
    pytest.importorskip("triton")
    found: dict[str, Any] = {"__name__": "codegen"}
    exec(compile(EXAMPLE, PAGE.name, "exec"), found)
    return found


@pytest.mark.slow
def test_the_example_is_right(names: dict[str, Any]) -> None:
    q, k, v, slopes, plan = (names[n] for n in ("q", "k", "v", "slopes", "plan"))
    trial = Trial.make(q, k, v, plan, scale=None, learned=[slopes], lse=False, backward=True, seed=0)
    grads = [names["grads"][x] for x in (q.values, k.values, v.values, slopes)]
    got = Result(names["out"].values, torch.empty(0), grads)
    same_loss = replace(trial, grad_out=torch.ones_like(trial.grad_out))
    ratios = check_against_reference(same_loss, lambda _: got, "the page's example", torch.bfloat16)
    assert set(ratios) == {"out", "grad_q", "grad_k", "grad_v", "grad_learned[0]"}


@pytest.mark.slow
def test_the_report_has_what_the_page_names(names: dict[str, Any]) -> None:
    printed = str(names["report"])
    columns = [c for c in printed.split("\n")[1].split("  ") if c.strip() and c.strip() != "kernel"]
    explained = " ".join(re.findall(r"^\| \*\*(.*?)\*\* \|", TEXT, re.MULTILINE))
    for word in ("forward", "delta", "backward", *map(str.strip, columns)):
        assert word in explained, word
    kinds = set(re.findall(r"^    \d+ x ([\w ]+):", printed, re.MULTILINE))
    assert {"operand", "tile list", "column"} <= kinds
    assert all(f"| {kind} |" in TEXT for kind in kinds)
    assert names["forward"].kv_indexed == 0
    assert set(names["forward"].code) == {"triton", "ttgir", "ptx", "sass"}


@pytest.mark.slow
def test_the_test_on_the_page_passes(names: dict[str, Any]) -> None:
    exec(compile(TEST, PAGE.name, "exec"), names)
    names["test_every_third_key"]()


def test_relative_links_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", TEXT)
    assert links
    for link in links:
        assert (PAGE.parent / link).exists(), link
