"""The README's example runs as printed, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import flexjag as fj

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_and_is_right() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, object] = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    q, k, v, out = (names[n] for n in ("q", "k", "v", "out"))
    wanted = fj.attention(q, k, v, mask=names["mask"], score=names["score"], backend="reference")
    torch.testing.assert_close(out.values, wanted.values, rtol=1e-5, atol=1e-5)  # float32, at most 68 keys a row
    assert q.values.grad is not None


def test_the_example_of_a_node_runs() -> None:
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    exec(compile(code, "docs/extending.md", "exec"), {"__name__": "extending"})


@pytest.mark.parametrize("page", ["README.md", "docs/design.md"])
def test_relative_links_exist(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (path.parent / link).exists(), link
