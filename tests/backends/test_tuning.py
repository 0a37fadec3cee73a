from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases import make_qkv

import flexjag as fj
from flexjag.backends.flex import options as flex_options
from flexjag.backends.flex import run as flex
from flexjag.backends.flex import tuning
from flexjag.codegen.make.capture import as_on_gpu

HERE = tuning.Device("A GPU", "9.0", "2.13.0", "3.7.0")
REAL_DEVICE = tuning.this_device  # the fixture hides it
WORK = tuning.Work("float16", 16, 16, "none", True, "forward")
FORWARD: tuning.Options = {
    "fwd_BLOCK_M": 64,
    "fwd_BLOCK_N": 32,
    "fwd_num_warps": 4,
    "fwd_num_stages": 2,
    "fwd_USE_TMA": True,
}
BACKWARD: tuning.Options = {
    "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32,
    "bwd_num_warps": 4, "bwd_num_stages": 1,
}  # fmt: skip
ENTRIES = [
    tuning.Entry(HERE, WORK, FORWARD, {"best": "x"}),
    tuning.Entry(HERE, replace(WORK, phase="backward"), BACKWARD, {}),
]


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that is read, on a machine whose CPU tensors count as being on a GPU."""
    monkeypatch.setenv("FLEXJAG_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FLEXJAG_TUNING", raising=False)
    monkeypatch.setattr(tuning, "this_device", lambda device: HERE)
    monkeypatch.setattr(flex_options, "_capability", torch.compiler.assume_constant_result(lambda: (9, 0)))
    tuning.entries.cache_clear()
    yield tmp_path / "tuning.json"
    tuning.entries.cache_clear()


def plan_and_inputs(
    mask: fj.Mask | None = None, score: fj.Score | None = None, dtype: torch.dtype = torch.float16
) -> tuple[fj.Plan, torch.Tensor, torch.Tensor]:
    q, _, v = make_qkv([5, 0, 9], dtype=dtype)
    return fj.plan(q, mask=fj.Causal() if mask is None else mask, score=score), q.values, v.values


def test_a_file_keeps_what_others_put_there(file: Path) -> None:
    other = tuning.Entry(replace(HERE, name="Another GPU"), WORK, {}, {"best": "built in"})
    tuning.write(file, [other, *ENTRIES])
    assert sorted(map(repr, tuning.read(file))) == sorted(map(repr, [other, *ENTRIES]))
    new = replace(ENTRIES[0], options=FORWARD | {"fwd_num_stages": 5})
    tuning.write(file, [new])
    assert sorted(map(repr, tuning.read(file))) == sorted(map(repr, [other, new, ENTRIES[1]]))
    assert [x.name for x in file.parent.iterdir()] == [file.name]


def test_measurements_go_over_the_built_in_options_and_only_over_those_they_name(file: Path) -> None:
    given = plan_and_inputs()
    before = flex_options.built_in(*given)
    assert flex_options.kernel_options(*given) == before
    assert before["fwd_BLOCK_M"] == 128  # so that there is something to go over
    tuning.entries.cache_clear()
    tuning.write(file, ENTRIES[:1])
    assert flex_options.kernel_options(*given) == before | FORWARD
    assert flex_options.built_in(*given) == before


def test_the_file_is_read_once(file: Path) -> None:
    tuning.write(file, ENTRIES)
    given = plan_and_inputs()
    assert tuning.lookup(*given) == FORWARD | BACKWARD
    file.unlink()
    assert tuning.lookup(*given) == FORWARD | BACKWARD


@pytest.mark.parametrize(
    "entry",
    [
        *[replace(ENTRIES[0], device=replace(HERE, **{name: "x"})) for name in asdict(HERE)],
        *[
            replace(ENTRIES[0], work=replace(WORK, **change))
            for change in ({"dtype": "bfloat16"}, {"dim": 32}, {"value_dim": 32}, {"score": "lookup"}, {"exact": False})
        ],
    ],
)
def test_what_holds_for_something_else_is_passed_over(entry: tuning.Entry, file: Path) -> None:
    tuning.write(file, [entry])
    assert tuning.lookup(*plan_and_inputs()) == {}


@pytest.mark.parametrize(
    ("work", "mask", "score"),
    [
        ({}, None, None),
        ({"score": "formula"}, None, fj.Alibi(torch.ones(2)) >> fj.SoftCap(9.0)),
        ({"score": "lookup"}, None, fj.RelativeBias(torch.ones(2, 5)) >> fj.SoftCap(9.0)),
        ({"exact": False}, fj.SameGroup(torch.arange(14)), None),
    ],
)
def test_a_plan_finds_its_kind_of_work(work: dict, mask: fj.Mask | None, score: fj.Score | None, file: Path) -> None:
    tuning.write(file, [replace(ENTRIES[0], work=replace(WORK, **work))])
    assert tuning.lookup(*plan_and_inputs(mask, score)) == FORWARD


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2}', '{"schema": 1, "entries": [{"device": {}}]}'])
def test_a_broken_file_is_told_once_and_passed_over(text: str, file: Path) -> None:
    file.write_text(text)
    given = plan_and_inputs()
    with pytest.warns(UserWarning, match=re.escape(f"{file} cannot be read: ")):
        assert tuning.lookup(*given) == {}
    assert tuning.lookup(*given) == {}  # where a second warning would be an error


def test_a_file_that_is_not_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning.lookup(*plan_and_inputs()) == {}
    tuning.write(file, ENTRIES)
    monkeypatch.setenv("FLEXJAG_TUNING", "")
    tuning.entries.cache_clear()
    assert tuning.lookup(*plan_and_inputs()) == {}
    monkeypatch.setenv("FLEXJAG_TUNING", str(file.with_name("other.json")))
    tuning.entries.cache_clear()
    with pytest.warns(UserWarning, match=r"other\.json is not there, though FLEXJAG_TUNING names it"):
        assert tuning.lookup(*plan_and_inputs()) == {}
    monkeypatch.setenv("FLEXJAG_TUNING", str(file))
    tuning.entries.cache_clear()
    assert tuning.lookup(*plan_and_inputs()) == FORWARD | BACKWARD


INFERENCE = replace(WORK, phase="inference")


@pytest.mark.parametrize(
    ("work", "options", "why"),
    [
        (WORK, {**FORWARD, "fwd_BLOCK_M": 256}, "fwd_BLOCK_M=256 is no option of a forward"),
        (WORK, {**FORWARD, "fwd_USE_TMA": 1}, "fwd_USE_TMA=1 is no option"),
        (WORK, {**FORWARD, "fwd_num_warps": 3}, "fwd_num_warps=3 is no option"),
        (WORK, {**FORWARD, "fwd_num_warps": [4]}, "fwd_num_warps=.4. is no option"),
        (WORK, {**FORWARD, "rm": 1}, "rm=1 is no option"),
        (WORK, BACKWARD, "bwd_BLOCK_M1=32 is no option of a forward"),
        (WORK, {"fwd_BLOCK_M": 64}, "fwd_BLOCK_N is missing"),
        (WORK, {"BACKEND": "FLASH"}, "FLASH is not for Work"),
        (replace(INFERENCE, score="formula"), {"BACKEND": "FLASH"}, "FLASH is not for Work"),
        (replace(INFERENCE, exact=False), {"BACKEND": "FLASH"}, "FLASH is not for Work"),
        (replace(WORK, phase="sideways"), FORWARD, "there is no phase 'sideways'"),
        (replace(WORK, dim="16"), FORWARD, "dim='16' is not of type int"),
        (replace(WORK, dtype=["float16"]), FORWARD, r"dtype=\['float16'\] is not of type str"),
        (ENTRIES[1].work, {**BACKWARD, "bwd_BLOCK_M1": 128}, "in blocks of 128x64 and 64x32, M1 must divide N1"),
        (ENTRIES[1].work, {**BACKWARD, "bwd_BLOCK_N2": 128}, "in blocks of 32x64 and 64x128, .* N2 must divide M2"),
    ],
)
def test_an_entry_that_flex_attention_would_not_take_is_left_out(work: Any, options: Any, why: str, file: Path) -> None:
    good = replace(ENTRIES[0], work=replace(WORK, dtype="float32"))
    bad = tuning.Entry(HERE, work, options, {})
    file.write_text(json.dumps({"schema": 1, "entries": [asdict(bad), asdict(good)]}))
    with pytest.warns(UserWarning, match=f"an entry is left out: .*{why}"):
        assert tuning.lookup(*plan_and_inputs()) == {}
    assert tuning.lookup(*plan_and_inputs(dtype=torch.float32)) == FORWARD


def test_without_gradients_there_may_be_other_options(file: Path) -> None:
    tuning.write(file, ENTRIES)
    with torch.no_grad():
        assert tuning.lookup(*plan_and_inputs()) == FORWARD
    tuning.write(file, [replace(ENTRIES[0], work=INFERENCE, options=FORWARD | {"fwd_num_warps": 8})])
    tuning.entries.cache_clear()
    assert tuning.lookup(*plan_and_inputs()) == FORWARD | BACKWARD
    with torch.no_grad():
        assert tuning.lookup(*plan_and_inputs()) == FORWARD | {"fwd_num_warps": 8}


def test_flash_is_taken_where_it_is_installed_for_one_mask_of_spans_without_gradients(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.write(file, [*ENTRIES, tuning.Entry(HERE, INFERENCE, {"BACKEND": "FLASH"}, {})])
    with torch.no_grad():
        monkeypatch.setattr(tuning, "flash_is_installed", lambda: False)
        assert tuning.lookup(*plan_and_inputs()) == FORWARD
        monkeypatch.setattr(tuning, "flash_is_installed", lambda: True)
        assert tuning.lookup(*plan_and_inputs()) == {"BACKEND": "FLASH"}
        assert tuning.lookup(*plan_and_inputs(), need_lse=True) == FORWARD
        assert tuning.lookup(*plan_and_inputs(fj.PerHead([fj.Causal(), fj.Full()]))) == FORWARD
    assert tuning.lookup(*plan_and_inputs()) == FORWARD | BACKWARD


def test_a_cpu_has_no_tuned_options() -> None:
    with (
        mock.patch.object(tuning, "this_device", REAL_DEVICE),
        mock.patch.object(tuning, "entries", side_effect=AssertionError("the file was read")),
    ):
        assert tuning.lookup(*plan_and_inputs()) == {}


def kernel_options_in(module: torch.fx.GraphModule) -> list[dict[str, Any]]:
    flex_attention = torch.ops.higher_order.flex_attention
    return [n.args[6] for n in module.graph.nodes if n.target is flex_attention]  # pyright: ignore


class Recorder:
    """A Dynamo backend that keeps the graphs and runs them eagerly."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(module)
        return module.forward


def test_options_reach_flex_attention_as_constants_of_one_graph(file: Path) -> None:
    tuning.write(file, ENTRIES)
    recorder = Recorder()

    def attend(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged) -> fj.Jagged:
        out = fj.attention(q, k, v, mask=fj.Causal(), backend="flex")
        assert isinstance(out, fj.Jagged)
        return out

    compiled = torch.compile(attend, backend=recorder, fullgraph=True)
    with as_on_gpu({}):
        for lengths in ([300, 20, 0, 55], [7, 200], [1000, 1, 2, 3, 4, 5]):  # of short and of long segments
            qkv = make_qkv(lengths, dtype=torch.float16)
            want = fj.attention(*qkv, mask=fj.Causal(), backend="reference")
            assert isinstance(want, fj.Jagged)
            torch.testing.assert_close(compiled(*qkv).values, want.values, atol=2e-3, rtol=2e-3)
    assert len(recorder.graphs) == 1
    (options,) = kernel_options_in(recorder.graphs[0])
    assert {k: options.get(k) for k in (*FORWARD, *BACKWARD)} == FORWARD | BACKWARD
    assert {type(options[k]) for k in (*FORWARD, *BACKWARD)} == {int, bool}
    assert options["BACKEND"] == "TRITON"


def test_options_to_be_measured_go_over_the_built_in_ones_not_over_the_files(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.write(file, ENTRIES)
    recorder, compile = Recorder(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **kwargs: compile(fn, backend=recorder, **kwargs))
    chosen = [{"fwd_BLOCK_N": 16}, {"fwd_BLOCK_N": 128}]
    with as_on_gpu({}):
        plan, q, v = plan_and_inputs()
        built_in = flex_options.built_in(plan, q, v)
        for options in chosen:
            flex.with_options(options)(q, q, v, plan, 0.25, False)
    assert len(recorder.graphs) == 2
    for options, graph in zip(chosen, recorder.graphs, strict=True):
        (found,) = kernel_options_in(graph)
        assert built_in | options == {k: found[k] for k in built_in}
        assert "fwd_USE_TMA" not in found
