from __future__ import annotations

import json
import os
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from flexjag.__main__ import main
from flexjag.cli import compile as cli_compile
from flexjag.cli import options as cli_tools
from flexjag.cli.compile import parse_options, shorten
from flexjag.codegen import compile as codegen
from flexjag.codegen import worker
from flexjag.errors import CodegenError, CommandError
from flexjag.testing import kernels


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """On a busy machine quick work may take long enough to be told of."""
    monkeypatch.setattr(cli_tools, "PATIENCE", 60.0)


def fails(capsys, arguments, *words):
    """The command exits with 2, prints one line on stderr with all of `words`, and nothing on stdout."""
    assert main(["compile", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    for word in words:
        assert word in printed.err


class FakeReport:
    """As little of a report as the command touches."""

    def __str__(self):
        return "the report"

    def to_json(self, indent):
        assert indent is None
        return '{"kernels": []}'

    def save(self, folder):
        (Path(folder) / "saved").touch()


@pytest.fixture
def asked(monkeypatch):
    """What the compiler was asked for, without compiling."""
    seen = []

    def compile_for(target, plan, q, k, v, **options):
        seen.append((target, plan, q, k, v, options))
        return FakeReport()

    monkeypatch.setattr(codegen, "compile_for", compile_for)
    return seen


@pytest.fixture
def nothing_compiles(monkeypatch):
    def call(*args, **kwargs):
        raise AssertionError("an error that could be told at once started a worker")

    monkeypatch.setattr(worker.subprocess, "Popen", call)
    monkeypatch.setattr(worker.subprocess, "run", call)


def test_help(capsys):
    assert main(["compile", "--help"]) == 0
    text = capsys.readouterr().out
    assert "usage: flexjag compile" in text
    for option in ("--target", "--mask", "--kv-heads", "--forward-only", "--option", "--save", "--simulate"):
        assert option in text
    assert "gfx942" in text
    assert "chunked(size)" in text


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "sm_70"], ["target", "sm_80, sm_90", "'sm_70'"]),
        (["--target", "gfx942"], ["target", "NVIDIA"]),
        (["--target", "h100"], ["target", "for the H100 say sm_90", "'h100'"]),
        (["--mask", "causal & windw(3)"], ["--mask", "'windw'", "'window'", "column 10"]),
        (["--mask", "causal and full"], ["--mask", "'&'", "column 8"]),
        (["--mask", "__import__('os')"], ["--mask", "unknown mask '__import__'", "column 1"]),
        (["--score", "alibi >> softcap"], ["--score", "cap is missing", "column 10"]),
        (["--mask", "prefix([1, 2])"], ["entries=2", "segments=4"]),
        (["--heads", "6", "--kv-heads", "4"], ["H=6", "G=4"]),
        (["--dim", "0"], ["--dim", "'0'"]),
        (["--dtype", "int8"], ["--dtype", "bf16", "'int8'"]),
        (["--lengths", "0,0"], ["--lengths", "1 to", "got 0"]),
        (["--lengths", "5,x"], ["--lengths", "'5,x'"]),
        (["--lengths", "5", "--kv-lengths", "0"], ["--kv-lengths", "got 0"]),
        (["--lengths", "9999999", "--heads", "64"], ["--lengths", "got 9999999"]),
        (["--lengths", "5,5", "--kv-lengths", "5"], ["q=2", "k=1"]),
        (["--option", "BLOK_M=64"], ["--option", "'BLOK_M'", "did you mean 'BLOCK_M'", "num_warps"]),
        (["--option", "BLOCK_M"], ["--option", "BLOCK_M", "a positive whole number", "''"]),
        (["--option", "BLOCK_M=0"], ["--option", "BLOCK_M", "'0'"]),
        (["--option", "PRESCALE_QK=1"], ["--option", "PRESCALE_QK", "true, false", "'1'"]),
        (["--option", "BACKEND=FAST"], ["--option", "TRITON", "'FAST'"]),
        (["--learned"], ["--learned", "score"]),
        (["--learned", "--score", "softcap(3)"], ["--learned", "alibi"]),
        (["--learned", "--score", "alibi", "--forward-only"], ["--learned", "backward"]),
        (["--simulate", "0"], ["--simulate", "'0'"]),
        (["--save", os.devnull], [os.devnull]),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(capsys, arguments, words):
    fails(capsys, arguments, *words)


def test_a_missing_triton_is_told(capsys, monkeypatch):
    monkeypatch.setattr(codegen.importlib.util, "find_spec", lambda name: None)
    fails(capsys, [], "triton", "pip install")


def test_a_worker_that_fails_is_one_line_without_its_traceback(capsys, monkeypatch):
    def compile_for(*args, **kwargs):
        raise CodegenError("worker: make failed: ValueError: no\nsecond line") from worker.WorkerTraceback("Traceback")

    monkeypatch.setattr(codegen, "compile_for", compile_for)
    fails(capsys, ["--forward-only"], "worker: make failed: ValueError: no second line")


def test_options_are_read_by_their_kind():
    read = parse_options(["BLOCK_M=64", "fwd_num_warps = 8", "bwd_BLOCK_N2=32", "WRITE_DQ=false", "BACKEND=TRITON"])
    assert read == {"BLOCK_M": 64, "fwd_num_warps": 8, "bwd_BLOCK_N2": 32, "WRITE_DQ": False, "BACKEND": "TRITON"}
    for wrong in ("fwd_bwd_BLOCK_M=3", "=3", "BLOCK_M=64.0", "BLOCK_M=-1", "BLOCK_M=²", "PRESCALE_QK=maybe"):
        with pytest.raises(CommandError, match="--option"):
            parse_options([wrong])


def test_segments_are_cut_to_the_most_that_fits():
    assert shorten([3, 0, 5], 8) == [3, 0, 5]
    assert shorten([3, 0, 5], 7) == [3, 0, 4]
    assert shorten([9, 9, 9], 8) == [2, 2, 2]
    assert shorten([1] * 8, 8) == [1] * 8
    with pytest.raises(CommandError, match="at most 7 segments for 7 tokens, got 8"):
        shorten([1] * 8, 7)


def test_what_is_asked_for_is_what_is_compiled(asked, capsys, tmp_path):
    shape = ["--heads", "6", "--kv-heads", "2", "--dim", "32", "--value-dim", "48", "--dtype", "fp16"]
    batch = ["--lengths", "20,0,30", "--kv-lengths", "7,8,9", "--mask", "causal(end)", "--score", "alibi", "--learned"]
    assert main(["compile", "--target", "sm_80", *shape, *batch, "--option", "BLOCK_M=32"]) == 0
    assert capsys.readouterr() == ("the report\n", "")
    target, plan, q, k, v, options = asked.pop()
    assert (target, options) == ("sm_80", {"backward": True, "kernel_options": {"BLOCK_M": 32}})
    assert [tuple(x.values.shape) for x in (q, k, v)] == [(50, 6, 32), (24, 2, 32), (24, 2, 48)]
    assert {x.values.dtype for x in (q, k, v)} == {torch.float16}
    assert repr(plan.mask) == "Causal(align='end')"
    assert plan.score.slopes.requires_grad
    folder = tmp_path / "new" / "folder"
    assert main(["compile", "--forward-only", "--save", str(folder), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"kernels": [], "simulated": None}
    assert printed.err == ""
    assert (folder / "saved").exists()
    target, plan, q, k, v, options = asked.pop()
    assert (target, options) == ("sm_90", {"backward": False, "kernel_options": {}})
    assert q.offsets is plan.layout.q_offsets or torch.equal(q.offsets, plan.layout.q_offsets)
    assert (q.values.shape, v.values.shape) == ((3997, 8, 64), (3997, 8, 64))
    assert plan.score is None


Match = namedtuple("Match", "plan q k v options")


def test_simulation_compares_a_small_random_batch(asked, capsys, monkeypatch):
    seen = []

    def match(plan, q, k, v, **options):
        seen.append(Match(plan, q, k, v, options))
        return {"out": 0.25, "grad_q": 1e-3}

    monkeypatch.setattr(kernels, "assert_kernels_match", match)
    arguments = ["compile", "--mask", "window(3, 3)", "--heads", "2", "--dim", "16", "--option", "BLOCK_M=32"]
    assert main([*arguments, "--simulate", "100"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "the report",
        "simulated on 99 random tokens in segments of 41, 0, 17, 41, few because it is slow; error over allowed error:",
        "  out: 0.25",
        "  grad_q: 0.001",
        "  agrees with the reference",
    ]
    assert printed.err == ""
    one = seen.pop()
    assert one.options == {"target": "sm_90", "backward": True, "kernel_options": {"BLOCK_M": 32}}
    assert asked[0][2].values.shape == (3997, 2, 16)
    for x in one[1:4]:
        assert x.values.dtype == torch.bfloat16
        assert (x.values != 0).double().mean() > 0.9
    assert not torch.equal(one.k.values, one.v.values)
    assert main([*arguments, "--simulate", "--lengths", "9,9", "--kv-lengths", "4,999", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["simulated"]
    assert found == {
        "lengths": [9, 9],
        "kv_lengths": [4, cli_compile.SIMULATED - 4],
        "passed": True,
        "error": None,
        "error_over_allowed": {"out": 0.25, "grad_q": 1e-3},
    }


@pytest.mark.usefixtures("asked")
def test_kernels_that_differ_are_told_and_exit_with_1(capsys, monkeypatch):
    def match(*args, **kwargs):
        raise AssertionError("out[0, 0] is 1\nnot 2")

    monkeypatch.setattr(kernels, "assert_kernels_match", match)
    assert main(["compile", "--simulate"]) == 1
    printed = capsys.readouterr()
    assert "DIFFERS FROM THE REFERENCE" in printed.out
    assert printed.err == "flexjag: out[0, 0] is 1 not 2\n"
    assert main(["compile", "--simulate", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["simulated"]
    assert (found["passed"], found["error"]) == (False, "out[0, 0] is 1\nnot 2")


SMALL = ["compile", "--heads", "2", "--kv-heads", "1", "--dim", "32", "--lengths", "200,0,60"]
SMALL += ["--mask", "causal & window(96)", "--score", "alibi", "--learned"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """One cache for all compilations here: they are the same."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
def test_a_real_compilation_is_saved_and_kept(capsys, monkeypatch, tmp_path, kept):
    pytest.importorskip("triton")
    monkeypatch.setenv("FLEXJAG_CACHE_DIR", str(kept))
    assert main([*SMALL, "--save", str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    report = json.loads(printed.out)
    assert report.pop("simulated") is None
    assert report["target"] == {"name": "sm_90", "device": "NVIDIA H200"}
    assert report["about"]["mask"] == "Causal() & Window(96, 0)"
    phases = {kernel["phase"]: kernel for kernel in report["kernels"]}
    assert set(phases) >= {"forward", "delta", "backward"}
    for phase in ("forward", "backward"):
        assert 0 < phases[phase]["registers"] <= 255
        assert phases[phase]["tensor_cores"]
        assert phases[phase]["loops"]
    saved = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert json.loads(saved["report.json"].read_text()) == report
    for end, words in (("py", "tl.dot"), ("ttgir", "tt.func"), ("ptx", ".target sm_90"), ("sass", "EXIT")):
        files = [path for name, path in saved.items() if name.endswith(f"_forward.{end}")]
        assert len(files) == 1
        assert words in files[0].read_text()
    assert any(name.endswith("_backward.cubin") for name in saved)
    assert "def call" in saved["forward_wrapper.py"].read_text()
    # The second time it comes from the disk, so no worker is started.
    monkeypatch.setattr(worker.subprocess, "Popen", None)
    monkeypatch.setattr(worker.subprocess, "run", None)
    assert main(SMALL) == 0
    assert capsys.readouterr().out == saved["report.txt"].read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_real_simulation_agrees_with_the_reference(capsys, monkeypatch, kept):
    pytest.importorskip("triton")
    monkeypatch.setenv("FLEXJAG_CACHE_DIR", str(kept))
    assert main([*SMALL, "--simulate", "120"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    *_, out, lse, grad_q, grad_k, grad_v, learned, last = printed.out.splitlines()
    assert "simulated on 120 random tokens in segments of 60, 0, 60," in printed.out
    names = ["out", "lse", "grad_q", "grad_k", "grad_v", "grad_learned[0]"]
    for line, name in zip((out, lse, grad_q, grad_k, grad_v, learned), names, strict=True):
        assert line.startswith(f"  {name}: ")
        assert 0 <= float(line.split()[-1]) <= 1
    assert last == "  agrees with the reference"
