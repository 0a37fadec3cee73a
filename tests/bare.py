"""flexjag with nothing but torch and numpy, in a virtual environment of its own: ``python tests/bare.py``.

It takes about a minute and is no part of pytest's run. Torch from PyPI brings Triton on Linux, its CPU builds do not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
ABSENT = ("attn_gym", "matplotlib", "rich", "cloudpickle", "pynvml", "hypothesis")


def main() -> None:
    """Make the environment and check in it."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "Scripts" if os.name == "nt" else "bin", "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", "torch", "numpy"], check=True)
        subprocess.run([*pip, "--no-deps", ROOT], check=True)
        alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([python, "-W", "error", __file__, "inside"], check=True, cwd=folder, env=alone)
    print("flexjag works with torch and numpy alone")


def check() -> None:
    """Attend, forward and backward, and see that what is missing is named."""
    assert [name for name in ABSENT if find_spec(name)] == [], "not as bare as this test wants it"
    import torch

    import flexjag as fj
    from flexjag.codegen.payload import pack

    assert not Path(fj.__file__).is_relative_to(ROOT), fj.__file__
    lengths = [70, 0, 130, 1]
    q = fj.Jagged.from_lengths(torch.randn(sum(lengths), 4, 16, requires_grad=True), lengths)
    k, v = (q.with_values(torch.randn(sum(lengths), 2, 16, requires_grad=True)) for _ in range(2))
    mask = fj.Causal() & (fj.Window(32, 0) | fj.Prefix(2))
    scores = {"tiled": fj.Alibi.from_heads(4) >> fj.SoftCap(30.0), "segments": fj.Alibi.from_heads(4), "auto": None}
    for backend, score in scores.items():
        plan = fj.plan(q, k, mask=mask, score=score)
        found, wanted = (
            [out, *torch.autograd.grad(out.sum(), [q.values, k.values, v.values])]
            for out in (fj.attention(q, k, v, plan=plan, backend=x).values for x in (backend, "reference"))
        )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)  # float32, sums of up to 34 keys
    assert fj.ops.jagged_softmax(q).values.shape == q.values.shape
    plan = fj.plan(q, mask=mask)
    assert "backend" in plan.explain()
    for extra, call in (("pictures", plan.show), ("codegen", lambda: pack(plan))):
        message = ""
        try:
            call()
        except fj.errors.MissingExtraError as error:
            message = str(error)
        assert message.endswith(f"pip install 'flexjag[{extra}]'"), (extra, message)
    for command, code, words in (
        (["explain", "--lengths", "100,30", "--mask", "causal"], 0, ""),
        (["demo", "--tokens", "64"], 2, "pip install 'flexjag[pictures]'"),
        (["demo", "--tokens", "64", "--picture", ""], 2, "pip install 'flexjag[progress]'"),
        (["compile"], 2, "pip install 'flexjag[codegen]'" if find_spec("triton") else "pip install triton"),
    ):
        done = subprocess.run([sys.executable, "-m", "flexjag", *command], capture_output=True, text=True, check=False)
        assert done.returncode == code, (command, done)
        assert words in done.stderr, (command, done)


if __name__ == "__main__":
    check() if sys.argv[1:] == ["inside"] else main()
