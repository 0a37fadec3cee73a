"""Exported programs and packages of AOTInductor: made here, loaded and run in a fresh process, on other batches."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import jagged
from torch import Tensor, nn
from torch.export import Dim

import flexjag as fj
from flexjag.kernels.cpp import build

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")  # of PyTorch's own export
SIZES = ([{0: Dim("T", max=4096)}, {0: Dim("S", max=100)}],)
OTHERS = ([100, 300], [3, 0, 5, 100], [2, 1], [300, 700, 0, 0, 24])


class Attend(nn.Module):
    """A plan made in the graph, shared by two layers."""

    def __init__(self, backend: str, normalizer: fj.Normalizer | None = None) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 9))
        self.backend, self.normalizer = backend, normalizer

    def forward(self, x: fj.Jagged) -> Tensor:
        mask = fj.Causal() & (fj.Window(20, 0) | fj.Prefix(2))
        plan = fj.plan(x, mask=mask, normalizer=self.normalizer)
        x = fj.attention(x, x, x, plan=plan, backend=self.backend)
        return fj.attention(x, x, x, plan=plan.with_score(fj.RelativeBias(self.table)), backend=self.backend).values


def batch(lengths: list[int]) -> fj.Jagged:
    return jagged(lengths, 2, 16, dtype=torch.float32, seed=sum(lengths))


def in_a_fresh_process(load: str, file: Path, model: nn.Module) -> None:
    """Run what is loaded from the file on other batches and compare it with the model."""
    with torch.no_grad():
        wanted = [(x.values, x.offsets, model(x)) for x in map(batch, OTHERS)]
    torch.save(wanted, file.with_suffix(".wanted"))
    code = f"""
        import torch
        import flexjag as fj
        module = {load}
        for values, offsets, wanted in torch.load({str(file.with_suffix(".wanted"))!r}):
            # Without a softmax, what adds up is large and its sum may be small; two layers of sticks leave 0 of [2, 1].
            largest = wanted.abs().max().clamp(min=1e-3)
            torch.testing.assert_close(module(fj.Jagged(values, offsets)) / largest, wanted / largest)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


KINDS: dict[str, fj.Normalizer | None] = {"softmax": None, "SiLU": fj.SiLU(), "stick-breaking": fj.StickBreaking()}


NEEDS_CPP = pytest.mark.skipif(build.refusal() is not None, reason=str(build.refusal()))


@NEEDS_CPP
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "kind"), [("tiled", "stick-breaking"), ("tiled", "softmax"), ("cpp", "softmax"), ("auto", "SiLU")]
)
def test_a_package_runs_in_a_fresh_process(backend: str, kind: str, tmp_path: Path) -> None:
    model = Attend(backend, KINDS[kind]).eval()
    with torch.no_grad():
        program = torch.export.export(model, (batch([50, 30, 70]),), dynamic_shapes=SIZES)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    in_a_fresh_process(f"torch._inductor.aoti_load_package({path!r})", tmp_path / "model", model)


@NEEDS_CPP
@pytest.mark.slow
@pytest.mark.parametrize(("backend", "strict"), [("tiled", False), ("cpp", False), ("auto", True)])
def test_an_exported_program_runs_in_a_fresh_process(backend: str, strict: bool, tmp_path: Path) -> None:
    model = Attend(backend).eval()
    program = torch.export.export(model, (batch([50, 30, 70]),), dynamic_shapes=SIZES, strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    in_a_fresh_process(f"torch.export.load({str(tmp_path / 'model.pt2')!r}).module()", tmp_path / "model", model)


@pytest.mark.slow
def test_flex_in_a_package_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model = Attend("flex").eval()
    with torch.no_grad():
        program = torch.export.export(model, (batch([100, 300]),), dynamic_shapes=SIZES)
        with pytest.raises(
            Exception, match="cannot be in a package of AOTInductor; export with backend='cpp' or 'tiled'"
        ):
            torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))


class Parts(nn.Module):
    """Takes Jagged arguments in a dictionary, and returns one."""

    def forward(self, batch: dict[str, Any]) -> fj.Jagged:
        q, k = batch["q"], batch["k"]
        return fj.attention(q, k, k, mask=fj.Window(5, 5), backend="tiled")


@pytest.mark.parametrize("strict", [False, True])
def test_leaves_are_named_in_dynamic_shapes(strict: bool) -> None:
    """By ``values`` and ``offsets``, which errors name, too."""
    given = {"q": batch([3, 6]), "k": batch([30, 5])}
    sizes = {"batch": {name: [{0: Dim(f"T_{name}", max=4096)}, {0: Dim(f"S_{name}", max=64)}] for name in given}}
    sizes["batch"]["k"][1] = sizes["batch"]["q"][1]
    program = torch.export.export(Parts(), (given,), dynamic_shapes=sizes, strict=strict)
    paths = torch.utils._pytree.tree_flatten_with_path(given)[0]
    assert [torch.utils._pytree.keystr(path) for path, _ in paths] == [
        "['q'].values", "['q'].offsets", "['k'].values", "['k'].offsets",
    ]  # fmt: skip
    for q, k in (([5], [7]), ([2, 0, 3], [0, 4, 200])):
        other = {"q": batch(q), "k": batch(k)}
        torch.testing.assert_close(program.module()(other).values, Parts()(other).values)
