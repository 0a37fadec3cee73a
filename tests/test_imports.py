"""`import flexjag` needs torch alone, and loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

ATTEND = """
import torch
x = fj.Jagged.from_lengths(torch.randn(7, 2, 16), [3, 4])
mask = fj.Causal() & (fj.Window(2, 0) | fj.Prefix(1))
for backend in ("auto", "reference", "tiled", "segments"):
    assert fj.attention(x, x, x, mask=mask, backend=backend).values.shape == (7, 2, 16)
"""


def run(code: str) -> None:
    """Run code in a fresh interpreter; its traceback is the failure."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def loaded_after(code: str, module: str) -> bool:
    """Whether `code` loads `module`."""
    code = f"import sys\n{textwrap.dedent(code)}\nsys.exit(42 if {module!r} in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 42), done.stderr
    return done.returncode == 42


HEAVY = [
    "triton",
    "attn_gym",
    "cloudpickle",
    "matplotlib",
    "rich",
    "hypothesis",
    "torch._dynamo",
    "torch._inductor",
]


def test_import_is_light() -> None:
    """One interpreter for all: it takes seconds to import torch."""
    run(f"""
        import sys
        import torch
        before = set(sys.modules)
        import flexjag
        new = set(sys.modules) - before
        heavy = [name for name in {HEAVY!r} if name in new]
        assert not heavy, heavy
    """)


def test_the_check_above_can_fail() -> None:
    assert loaded_after("import json", "json")


def test_attention_in_eager_mode_starts_no_compiler() -> None:
    assert not loaded_after("import flexjag as fj" + ATTEND, "torch._inductor.compile_fx")


@pytest.mark.parametrize(
    "missing",
    [
        ["triton"],
        ["attn_gym"],
        ["triton", "attn_gym", "cloudpickle", "matplotlib", "rich", "hypothesis", "pynvml"],
    ],
    ids=str,
)
def test_works_without(missing: list[str]) -> None:
    """None in sys.modules makes `import x` raise, as if it were not installed."""
    block = f"import sys\nfor name in {missing!r}:\n    sys.modules[name] = None\n"
    run(block + "import flexjag as fj" + ATTEND)


def test_public_names_exist() -> None:
    import flexjag

    assert len(set(flexjag.__all__)) == len(flexjag.__all__)
    assert [name for name in flexjag.__all__ if not hasattr(flexjag, name)] == []
