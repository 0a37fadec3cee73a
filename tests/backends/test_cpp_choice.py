"""What ``auto`` does with the backend ``cpp``, and the code that a plan shows of it."""

from __future__ import annotations

import pytest
import torch

import flexjag as fj
from flexjag.backends.cpp import library
from flexjag.errors import BackendError, BuildError
from flexjag.kernels.cpp import build

pytestmark = pytest.mark.skipif(build.refusal() is not None, reason=str(build.refusal()))


def batch() -> tuple[fj.Jagged, fj.Plan]:
    q = fj.Jagged.from_lengths(torch.randn(3000, 4, 64), [1000, 2000])
    return q, fj.plan(q, mask=fj.Causal(), score=fj.SoftCap(5.0))


def test_another_backend_runs_if_a_build_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    q, plan = batch()
    assert plan.backend == "cpp"
    wanted = fj.attention(q, q, q, plan=plan, backend="tiled").values

    def fail(text: str) -> None:
        raise BuildError("g++ 0.1 cannot compile the CPU kernels: error: too old")

    monkeypatch.setattr(library, "load", fail)
    for _ in range(2):
        assert torch.equal(fj.attention(q, q, q, plan=plan).values, wanted)
    with pytest.raises(BuildError, match="too old"):
        fj.attention(q, q, q, plan=plan, backend="cpp")


def test_it_is_turned_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    q, plan = batch()
    monkeypatch.setenv("FLEXJAG_CPP", "0")
    assert plan.backend == "tiled"
    assert "FLEXJAG_CPP" in plan.explain()
    with pytest.raises(BackendError, match="FLEXJAG_CPP"):
        fj.attention(q, q, q, plan=plan, backend="cpp")


def test_a_plan_shows_the_code_that_is_compiled() -> None:
    _, plan = batch()
    assert "tanh(" in plan.source("cpp")
    assert "Lanes<float> dscore(" in plan.source("cpp")
    for name in ("tiled", "auto"):
        with pytest.raises(
            BackendError, match=f"backend: must be one that prints code: cpp, triton; got backend='{name}'"
        ):
            plan.source(name)
    with pytest.raises(BackendError, match="'triton' cannot run this plan"):
        plan.source("triton")
