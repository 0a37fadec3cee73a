"""The page on FBGEMM: its example runs, and its table has every function."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from fbgemm_table import CASES

from flexjag.interop import fbgemm

TEXT = (Path(__file__).parents[2] / "docs" / "interop-fbgemm.md").read_text(encoding="utf-8")


def test_the_example_runs_and_is_right() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, Any] = {}
    exec(compile(blocks[0], "docs/interop-fbgemm.md", "exec"), names)
    values, weight, offsets = (names[n] for n in ("values", "weight", "offsets"))
    assert offsets.tolist() == [0, 2, 2, 5]
    parts = zip(values.split([2, 0, 3]), weight, strict=True)
    wanted = torch.stack([torch.softmax(x @ w, 0).T @ x for x, w in parts])
    torch.testing.assert_close(names["pooled"], wanted, rtol=0, atol=1e-5)  # sums of at most 8 products of float32
    assert torch.equal(names["again"], values)
    assert values.grad is not None
    assert weight.grad is not None


def test_the_table_has_every_function_and_its_operands() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", TEXT, re.MULTILINE)
    assert sorted(name for name, _ in rows) == fbgemm.__all__
    for name, operands in rows:
        if name in CASES:
            given = [word for word in operands.strip("* ").split(", ") if word]
            assert len(given) == len(CASES[name].shapes), name
