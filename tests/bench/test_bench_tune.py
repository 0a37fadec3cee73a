"""Finding the fastest kernel options, with kernels that are plain torch and a clock that is told the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import CUDA_ONLY, make_qkv

import flexjag as fj
from flexjag.backends.flex import tuning
from flexjag.backends.tiled import run as tiled
from flexjag.bench.cli import main
from flexjag.bench.suites.registry import ArmResult
from flexjag.bench.tuning import candidates as tune_candidates
from flexjag.bench.tuning import tune
from flexjag.bench.tuning.candidates import WORKS, TuningSizes, backward_candidates, forward_candidates, subjects
from flexjag.codegen.worker import Worker
from flexjag.testing import assert_kernels_match, assert_matches_reference

HERE = tuning.Device("A GPU", "9.0", "2.13.0", "3.7.0")
REAL_DEVICE = tuning.this_device  # the fixture hides it
WORK = tuning.Work("float16", 16, 16, "none", True, "forward")

SIZES = TuningSizes(4, 2, 16, torch.float32, 60, device="cpu")
SHARED = 227 * 1024


class Bench:
    """Kernels whose speed and errors are made up.

    Attributes:
        cost: From options to the seconds of a step.
        wrong: Whether the results of these options are off.
        broken: Whether these options do not compile.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: Callable[[Mapping[str, Any]], float]) -> None:
        self.now, self.cost = 0.0, cost
        self.wrong: Callable[[Mapping[str, Any]], bool] = lambda options: False
        self.broken: Callable[[Mapping[str, Any]], bool] = lambda options: False
        self.tried: list[Mapping[str, Any]] = []
        clock = SimpleNamespace(perf_counter=lambda: self.now, monotonic=time.monotonic)
        monkeypatch.setattr("flexjag.bench.measuring.measure.time", clock)
        monkeypatch.setattr(
            "flexjag.bench.measuring.measure.gc", SimpleNamespace(collect=lambda: None)
        )  # it takes seconds
        few = {
            "STEPS": 1,
            "FORWARD": ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)),
            "BACKWARD": ((32, 128, 8, 3), (64, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3)),
            "WITH_TMA": 1,
        }
        for name, value in few.items():
            monkeypatch.setattr(tune_candidates, name, value)

    def attend(self, options: Mapping[str, Any]) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
        self.tried.append(options)
        if self.broken(options):
            raise RuntimeError("out of resource: shared memory")

        def run(*args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
            self.now += self.cost(options)
            out, lse = tiled.run(*args)
            return (out * 1.01 if self.wrong(options) else out), lse

        return run

    def tune(self, work: str = "spans") -> dict[str, tuning.Entry]:
        made = tune.tune(work, SIZES, HERE, SHARED, 1000.0, lambda line: None, attend=self.attend)
        assert {x.device for x in made} == {HERE}
        return {x.work.phase: x for x in made}


def prefers(**favourite: Any) -> Callable[[Mapping[str, Any]], float]:
    """Options cost less, the more of these they have."""
    return lambda options: 2.0 - sum(options.get(k) == v for k, v in favourite.items()) / len(favourite)


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that is read, on a machine whose CPU tensors count as being on a GPU; without FLASH."""
    monkeypatch.setenv("FLEXJAG_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FLEXJAG_TUNING", raising=False)
    monkeypatch.setattr(tuning, "this_device", lambda device: HERE)
    monkeypatch.setattr(tuning, "flash_is_installed", lambda: False)
    tuning.entries.cache_clear()
    yield tmp_path / "tuning.json"
    tuning.entries.cache_clear()


@pytest.mark.parametrize("work", WORKS)
def test_the_fastest_right_candidate_wins(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_stages": 3, "bwd_BLOCK_M1": 64, "bwd_num_warps": 4}
    bench = Bench(monkeypatch, prefers(**best, bwd_num_stages=3))
    found = bench.tune(work)
    assert set(found) == {"inference", "forward", "backward"}
    assert found["inference"].options == found["forward"].options
    score, exact = WORKS[work]
    assert found["forward"].work == tuning.Work("float32", 16, 16, score, exact, "forward")
    own = {k: x for k, x in best.items() if k.startswith("fwd_")}
    assert own.items() <= found["forward"].options.items()
    assert not any(k.startswith("fwd_") for k in found["backward"].options)
    assert {k: x for k, x in best.items() if k not in own}.items() <= found["backward"].options.items()
    assert all(tuning.objection(x) is None for x in found.values())
    backwards = [x for x in bench.tried if "bwd_BLOCK_M1" in x]
    assert backwards
    assert all(found["forward"].options.items() <= x.items() for x in backwards)  # measured behind the best forward


def test_what_was_measured_is_written_and_read(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    bench = Bench(monkeypatch, prefers(fwd_BLOCK_M=64, fwd_num_stages=2, bwd_BLOCK_M1=64))
    tune._tune_all([("spans", SIZES)], HERE, SHARED, file, 1000.0, lambda line: None, attend=bench.attend)
    seen = {x.work.phase: x.measured for x in tuning.read(file)}
    assert seen["forward"]["best"].startswith("64x")
    times = seen["forward"]["candidates"]["causal"]
    assert times[seen["forward"]["best"]]["seconds"] == pytest.approx(2.0 - 2 / 3)
    assert times["built in"]["seconds"] == pytest.approx(2.0)
    q, _, v = make_qkv([5, 0, 9], dtype=torch.float32)
    found = tuning.lookup(fj.plan(q, mask=fj.Causal()), q.values, v.values)
    assert (found["fwd_BLOCK_M"], found["fwd_num_stages"], found["bwd_BLOCK_M1"]) == (64, 2, 64)


def test_a_wrong_or_broken_candidate_is_refused_however_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, prefers(fwd_BLOCK_N=128, bwd_BLOCK_M1=64))
    bench.wrong = lambda options: options.get("fwd_BLOCK_N") == 128
    bench.broken = lambda options: options.get("bwd_BLOCK_M1") == 64
    found = bench.tune()
    assert found["forward"].options.get("fwd_BLOCK_N") != 128
    assert found["backward"].options.get("bwd_BLOCK_M1") != 64
    told = found["forward"].measured["candidates"]["causal"]["128x128, 8 warps, 2 stages"]
    assert "output is off by" in told["wrong"]
    told = found["backward"].measured["candidates"]["causal"]["64x128, 128x64, 8 warps, 3 stages"]
    assert "out of resource" in told["failed"]


def test_a_gradient_that_is_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Larger(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return 1.01 * grads[0]

    bench = Bench(monkeypatch, prefers(bwd_num_warps=4))
    plain = bench.attend

    def attend(options: Mapping[str, Any]) -> Callable[..., tuple[torch.Tensor, None]]:
        run = plain(options)
        return lambda *args: ((Larger.apply if options.get("bwd_num_warps") == 4 else torch.clone)(run(*args)[0]), None)

    bench.attend = attend
    found = bench.tune()
    assert found["backward"].options.get("bwd_num_warps") != 4
    told = found["backward"].measured["candidates"]["causal"]["64x64, 64x64, 4 warps, 2 stages"]
    assert "dq is off by" in told["wrong"]


def test_equal_times_leave_the_options_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Bench(monkeypatch, lambda options: 1.0).tune()
    assert [x.options for x in found.values()] == [{}, {}, {}]
    assert all(tuning.objection(x) is None for x in found.values())


def test_flash_is_for_inference_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "flash_is_installed", lambda: True)
    bench = Bench(monkeypatch, lambda options: 1.0 if options.get("BACKEND") == "FLASH" else 2.0)
    found = bench.tune()
    assert found["inference"].options == {"BACKEND": "FLASH"}
    assert [found[phase].options for phase in ("forward", "backward")] == [{}, {}]
    assert all(tuning.objection(x) is None for x in found.values())
    bench.wrong = lambda options: options.get("BACKEND") == "FLASH"
    assert bench.tune()["inference"].options == {}  # goes over what was there
    bench.tried.clear()
    bench.tune("formula")
    assert not any(x.get("BACKEND") == "FLASH" for x in bench.tried)


def test_without_time_nothing_is_said_to_be_best(
    monkeypatch: pytest.MonkeyPatch, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(monkeypatch, lambda options: 1.0)
    tune._tune_all([("spans", SIZES)], HERE, SHARED, file, 0.0, lambda line: None, attend=bench.attend)
    assert tuning.read(file) == []
    assert "no candidate was right in the time there was" in capsys.readouterr().out


def result(name: str, *seconds: float, status: str = "ok") -> dict[str, ArmResult]:
    return {name: ArmResult(name, status, seconds=list(seconds))}


def test_the_pick() -> None:
    one = result("built in", 1.0, 1.0, 1.0) | result("a", 0.5, 0.5, 0.5) | result("b", 0.8, 0.8, 0.8)
    two = result("built in", 1.0, 1.0, 1.0) | result("a", 3.0, 3.0, 3.0) | result("b", 0.9, 0.9, 0.9)
    names = ["built in", "a", "b"]
    assert tune.pick({"one": one}, names) == "a"
    assert tune.pick({"one": one, "two": two}, names) == "b"  # sqrt(0.72) against sqrt(1.5)
    assert tune.pick({"one": one | result("a", status="wrong")}, names) == "b"
    assert tune.pick({"one": one, "two": result("b", 0.9)}, names) == "b"  # the others were not tried there
    noisy = one | result("built in", 0.5, 1.0, 1.5)  # a spread of half the median
    assert tune.pick({"one": noisy}, ["built in", "b"]) == "built in"
    assert tune.pick({"one": result("a", status="failed")}, ["a"]) is None


@pytest.mark.parametrize("dim", [16, 64, 128, 256])
@pytest.mark.parametrize(("capability", "shared"), [("8.0", 163 * 1024), ("9.0", SHARED), ("10.0", SHARED)])
def test_candidates_are_ones_that_flex_attention_takes(dim: int, capability: str, shared: int) -> None:
    sizes = replace(SIZES, dim=dim, dtype=torch.bfloat16)
    for phase, make in (("forward", forward_candidates), ("backward", backward_candidates)):
        found = make(sizes, capability, shared)
        assert (8 if dim <= 128 else 3) <= len(found) <= 16
        assert any(k.endswith("TMA") for k in found) == (capability != "8.0")
        assert len({tuple(x.items()) for x in found.values()}) == len(found)
        for options in found.values():
            work = replace(WORK, phase=phase)  # pyright: ignore[reportArgumentType]
            assert tuning.objection(tuning.Entry(HERE, work, options, {})) is None
        assert len(make(sizes, capability, 4 * 1024)) < len(found)


def test_subjects_are_the_work_they_stand_for() -> None:
    for work, kind in WORKS.items():
        for subject in subjects(work, SIZES):
            assert (tuning.score_kind(subject.plan.score), subject.plan.exact) == kind
    no_keys = ~subjects("spans", SIZES)[1].plan.to_dense().any(1)
    assert no_keys.any()  # FLASH has to give zeros there
    assert not no_keys.all()


def test_there_has_to_be_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    assert capsys.readouterr().err == "flexjag bench: tune: needs a GPU; no CUDA device is available here\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dim", "8"], "--dim: must be from 16 to 256"),
        (["--dim", "512"], "--dim: must be from 16 to 256"),
        (["--heads", "3", "--kv-heads", "2"], "--heads: must be a multiple of --kv-heads"),
        (["--tokens", "0"], "--tokens, --minutes: must be over 0"),
        (["--minutes", "nan"], "--tokens, --minutes: must be over 0"),
        (["--work", "all"], "argument --work: invalid choice"),
        (["--out", __file__], "is there and is no file of tuned options"),
    ],
)
def test_arguments(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


@pytest.mark.slow
def test_tma_kernels_are_right() -> None:
    pytest.importorskip("triton")
    q, k, v = make_qkv([100, 0, 37], dim=32, dtype=torch.float16)
    made = fj.plan(q, mask=fj.Causal() & (fj.Window(40, 0) | fj.Prefix(4)) & ~fj.Prefix(1))
    sizes = replace(SIZES, dim=32, dtype=torch.float16)
    options = forward_candidates(sizes, "9.0", SHARED)["128x128, 8 warps, 2 stages, TMA"]
    options |= backward_candidates(sizes, "9.0", SHARED)["64x128, 128x64, 8 warps, 3 stages, TMA"]
    with Worker(interpret=True) as worker:
        same: dict[str, Any] = {"kernel_options": options, "scale": 32**-0.5, "worker": worker}
        report = fj.compile_for("sm_90", made, q, k, v, return_lse=True, assemble=False, **same)
        assert set(report.wrappers) == {"forward", "backward"}
        assert all("make_tensor_descriptor" in text for text in report.wrappers.values())
        assert_kernels_match(made, q, k, v, **same)  # does not compile again


@pytest.mark.parametrize("dim", [pytest.param(64, marks=CUDA_ONLY)])
def test_on_a_gpu_candidates_are_right_and_what_wins_is_used(
    dim: int, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    for name, value in {"FORWARD": ((64, 64, 4, 3),), "BACKWARD": ((64, 64, 8, 3),)}.items():
        monkeypatch.setattr(tune_candidates, name, value)
    monkeypatch.setattr(tuning, "this_device", REAL_DEVICE)
    here = REAL_DEVICE(torch.device("cuda", torch.cuda.current_device()))
    assert here is not None
    sizes = TuningSizes(4, 2, dim, torch.bfloat16, 2048)
    made = tune.tune("spans", sizes, here, 96 * 1024, 400.0, lambda line: None)
    assert [x.work.phase for x in made] == ["inference", "forward", "backward"]
    for entry in made:
        for results in entry.measured["candidates"].values():
            assert all("seconds" in x for x in results.values()), results
    blocks = forward_candidates(sizes, "8.0", SHARED) | backward_candidates(sizes, "8.0", SHARED)
    forward, backward = blocks.values()
    tuning.write(file, [replace(made[1], options=forward), replace(made[2], options=backward)])
    tuning.entries.cache_clear()
    made_here = make_qkv([300, 0, 41], heads=4, groups=2, dim=dim, dtype=torch.bfloat16)
    q = made_here[0].to("cuda")
    k, v = (q.with_values(x.values.cuda()) for x in made_here[1:])
    plan = fj.plan(q, mask=fj.Causal())
    assert tuning.lookup(plan, q.values, v.values) == forward | backward
    assert_matches_reference(q, k, v, plan=plan, backend="flex")
