"""``flexjag compile --target cpu``: the C++ of a plan and its speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexjag.__main__ import main
from flexjag.kernels.cpp import build

pytestmark = pytest.mark.skipif(build.refusal() is not None, reason=str(build.refusal()))
BATCH = ["compile", "--target", "cpu", "--lengths", "40,0,9", "--heads", "2", "--dim", "16", "--dtype", "fp32"]


def test_it_prints_the_functions_and_the_rates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*BATCH, "--mask", "causal", "--save", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert "Lanes<float> score(" in said
    assert "GFLOP/s" in said
    assert "of torch.mm's rate" in said
    assert (tmp_path / "new" / "kernels.cpp").read_text() in said


def test_its_json_counts_the_pairs_of_the_mask(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BATCH, "--mask", "causal", "--forward-only", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["flops"] == {"forward": 2 * (40 * 41 + 9 * 10) / 2 * 2 * (16 + 16)}
    assert set(found["seconds"]) == {"forward"}


@pytest.mark.parametrize("option", [["--simulate", "100"], ["--option", "BLOCK_M=64"], ["--learned"]], ids=str)
def test_options_for_gpus_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BATCH, *option]) == 2
    assert f"{option[0]}: is for GPUs" in capsys.readouterr().err
