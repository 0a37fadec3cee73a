"""compile_for: reports, refusals, and a caller's process that does not notice."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from cases import make_qkv

import flexjag as fj
from flexjag import caches
from flexjag.codegen import cache
from flexjag.codegen.compile import Report
from flexjag.codegen.report import CODE
from flexjag.codegen.worker import Worker, call
from flexjag.errors import BackendError, CodegenError, ShapeError, TargetError

pytest.importorskip("triton")
LENGTHS = [100, 3, 0, 153]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXJAG_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "kernels"))


def problem(dim: int = 64, heads: int = 2) -> tuple[fj.Plan, tuple[fj.Jagged, fj.Jagged, fj.Jagged]]:
    qkv = make_qkv(LENGTHS, dtype=torch.float32, dim=dim, heads=heads)
    return fj.plan(qkv[0], mask=fj.Causal(), score=fj.Alibi.from_heads(heads)), qkv


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    plan, qkv = problem()
    with mock.patch.dict("os.environ", FLEXJAG_CACHE_DIR=str(tmp_path_factory.getbasetemp() / "kernels")):
        return fj.compile_for("sm_90", plan, *qkv, dtype=torch.bfloat16)


def test_a_report_has_every_kernel_with_its_code(report: Report) -> None:
    assert [k.phase for k in report.shown] == ["forward", "delta", "backward"]
    for kernel in report.kernels:
        assert kernel.code.keys() == {"triton", "ttgir", "ptx", "sass"}
        assert f"def {kernel.name}(" in kernel.triton
        assert kernel.name in kernel.ptx
        assert 0 < kernel.registers <= 255
        assert 0 < kernel.occupancy <= 1
        assert kernel.shared_bytes <= report.target.shared_per_block
        assert kernel.instructions > 10
    forward, backward = report["forward"], report["backward"]
    assert forward.tensor_cores == backward.tensor_cores == ("wgmma",)
    assert {(x.over, x.masked) for x in forward.loops} == {("kv", True), ("kv", False)}
    assert {(x.over, x.masked) for x in backward.loops} == {(o, m) for o in ("q", "kv") for m in (True, False)}
    assert forward.kv_indexed == backward.kv_indexed == 0
    with pytest.raises(KeyError, match="'prologue'"):
        report["prologue"]


def test_a_report_prints_and_saves_all_that_it_knows(report: Report, tmp_path: Path) -> None:
    text = str(report)
    assert "sm_90 (NVIDIA H200), not run" in text
    assert "Causal()" in text
    assert "loop over kv of PARTIAL tiles" in text
    facts = json.loads(report.to_json())
    assert facts["versions"]["torch"] == torch.__version__
    kernel = facts["kernels"][[k.phase for k in report.kernels].index("forward")]
    assert kernel["registers"] == report["forward"].registers
    assert kernel["loops"][0]["loads"]
    saved = {x.name for x in report.save(tmp_path / "kernels").iterdir()}
    for i, k in enumerate(report.kernels):
        assert {f"{i}_{k.phase}.{end}" for end in (*(CODE[c] for c in k.code), "cubin")} <= saved
    assert {"report.json", "report.txt", "forward_wrapper.py", "backward_wrapper.py"} <= saved


def test_results_are_kept_on_disk_until_something_changes(report: Report) -> None:
    plan, qkv = problem()
    with mock.patch("flexjag.codegen.compile.call", side_effect=AssertionError("not from the cache")) as start:
        again = fj.compile_for("sm_90", plan, *qkv, dtype=torch.bfloat16)
        assert again["forward"].sass == report["forward"].sass
        other = [
            lambda: fj.compile_for("sm_90", plan, *qkv, dtype=torch.bfloat16, cache=False),
            lambda: fj.compile_for("sm_80", plan, *qkv, dtype=torch.bfloat16),
            lambda: fj.compile_for("sm_90", plan, *qkv, dtype=torch.bfloat16, backward=False),
            lambda: fj.compile_for("sm_90", plan, *qkv, dtype=torch.bfloat16, kernel_options={"BLOCK_M": 64}),
            lambda: fj.compile_for("sm_90", plan, *qkv),
            lambda: fj.compile_for("sm_90", problem(dim=32)[0], *problem(dim=32)[1], dtype=torch.bfloat16),
        ]
        for make in other:
            with pytest.raises(AssertionError, match="not from the cache"):
                make()
        for name in ("_source_digest", "_own_modules"):
            with mock.patch.object(cache, name, return_value="changed"), pytest.raises(AssertionError):
                fj.compile_for("sm_90", plan, *qkv, dtype=torch.bfloat16)
        assert start.call_count == len(other) + 2


def test_an_entry_that_cannot_be_read_is_as_good_as_none() -> None:
    cache.store("broken", {"a": 1})
    assert cache.load("broken") == {"a": 1}
    path = caches.folder() / "kernels" / "broken.pkl.z"
    path.write_bytes(path.read_bytes()[:-3])
    assert cache.load("broken") is None
    assert cache.load("missing") is None


STATE = """
import hashlib, os, sys, torch, triton
import torch._dynamo.device_interface, torch._higher_order_ops.flex_attention
import torch.nn.attention.flex_attention, torch._inductor.runtime.triton_helpers, torch._dynamo
import flexjag.codegen.compile, flexjag.codegen.payload, cloudpickle, flexjag.backends.flex.run
import flexjag as fj
def state():
    found = {}
    for name in sorted(sys.modules):
        if name.split(".")[0] in ("torch", "triton", "flexjag") and sys.modules[name] is not None:
            for key, value in list(vars(sys.modules[name]).items()):
                if callable(value):
                    found[name, key] = id(value)
                    if isinstance(value, type):
                        found |= {(name, key, k): id(v) for k, v in list(vars(value).items()) if callable(v)}
    active = type(triton.runtime.driver).__name__, torch.cuda.is_available(), torch.version.cuda
    return found, active, dict(os.environ), list(sys.path)
x = fj.Jagged.from_lengths(torch.randn(40, 2, 32), [30, 10])
p = fj.plan(x, mask=fj.Causal())
before = state()
r = fj.compile_for("sm_80", p, x, x, x, cache=False)
r.simulate(x, x, x, x)
after = state()
changed = [k for k, v in before[0].items() if after[0].get(k) != v]
assert not changed, changed[:10]
assert before[1:] == after[1:]
"""


@pytest.mark.slow
def test_the_callers_process_is_unchanged() -> None:
    """In a process of its own, so that what other tests imported and patched does not matter."""
    import subprocess

    done = subprocess.run([sys.executable, "-c", STATE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_simulation_takes_new_values_of_the_same_shapes() -> None:
    plan, qkv = problem(dim=32)
    report = fj.compile_for("sm_90", plan, *qkv, backward=False, assemble=False)
    new = tuple(x.with_values(torch.randn_like(x.values)) for x in qkv)
    for given in (qkv, new):
        out, grads = report.simulate(*given)
        want = fj.attention(*given, plan=plan, backend="reference")
        torch.testing.assert_close(out.values, want.values, atol=1e-5, rtol=1e-5)
        assert grads == {}
    longer = make_qkv([*LENGTHS, 7], dtype=torch.float32, dim=32)
    with pytest.raises(ShapeError, match="args: must be what the kernels were made for"):
        report.simulate(*longer)
    with pytest.raises(CodegenError, match="grad_out: these kernels were made with backward=False"):
        report.simulate(*qkv, grad_out=qkv[0])


class Layer(torch.nn.Module):
    """Two attentions with different masks, parameters before, between and behind."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(32, 3 * 32)
        self.slopes = torch.nn.Parameter(torch.tensor([0.5, 0.1]))

    def forward(self, x: fj.Jagged, first: fj.Plan) -> fj.Jagged:
        q, k, v = (x.with_values(t.unflatten(1, (2, 16))) for t in self.project(x.values).chunk(3, 1))
        middle = fj.attention(q, k, v, plan=first)
        again = fj.attention(middle, k, v, mask=fj.Chunked(16), score=fj.Alibi(self.slopes))
        return x.with_values(again.values.flatten(1) + x.values)


@pytest.mark.slow
def test_a_module_with_two_attentions_is_compiled_and_simulated() -> None:
    layer = Layer()
    x = fj.Jagged.from_lengths(torch.randn(90, 32, requires_grad=True), [50, 0, 40])
    plan = fj.plan(x, mask=fj.Causal())
    report = fj.compile_for("sm_90", layer, x, plan)
    phases = [k.phase for k in report.kernels]
    assert phases.count("forward") == phases.count("backward") == 2
    assert report.about["function"] == "Layer"
    grad = torch.randn(90, 32)
    out, grads = report.simulate(grad_out=grad)
    want = layer(x, plan)
    learned = [x.values, *layer.parameters()]
    torch.testing.assert_close(out.values, want.values, atol=1e-5, rtol=1e-5)
    for leaf, wanted in zip(learned, torch.autograd.grad(want.values, learned, grad), strict=True):
        torch.testing.assert_close(grads[leaf], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (TargetError, "target: must be one of sm_80, sm_90, sm_100, gfx942; got target='sm_70'", ("sm_70", {}, {})),
        (TargetError, "are made for NVIDIA's GPUs only", ("gfx942", {}, {})),
        (BackendError, "kernels have no float64", ("sm_90", {"dtype": torch.float64}, {})),
        (BackendError, "tiles of 128; got block_size=64", ("sm_90", {}, {"block_size": 64})),
        (CodegenError, "took longer than timeout=0.01 s", ("sm_90", {"timeout": 0.01, "cache": False}, {})),
        (CodegenError, "worker: make failed: ", ("sm_90", {"kernel_options": {"BLOCK_M": "x"}, "cache": False}, {})),
    ],
)
def test_refusals_are_one_clear_line(error: type[Exception], match: str, make: tuple[str, dict, dict]) -> None:
    target, options, planning = make
    qkv = make_qkv(LENGTHS, dtype=torch.float32)
    plan = fj.plan(qkv[0], mask=fj.Causal(), **planning)
    with pytest.raises(error, match=match) as caught:
        fj.compile_for(target, plan, *qkv, **options)
    assert "\n" not in str(caught.value)


def test_refusals_of_arguments() -> None:
    plan, qkv = problem()
    with pytest.raises(ShapeError, match="a plan takes q, k and v"):
        fj.compile_for("sm_90", plan, qkv[0])
    with pytest.raises(CodegenError, match="plan: must be a Plan or a function"):
        fj.compile_for("sm_90", 3, *qkv)  # type: ignore[arg-type]
    with pytest.raises(CodegenError, match="dtype, scale, return_lse: are for a plan"):
        fj.compile_for("sm_90", lambda x: x, qkv[0], dtype=torch.bfloat16)
    with pytest.raises(CodegenError, match="backward: needs a tensor that requires a gradient"):
        fj.compile_for("sm_90", lambda x: x, qkv[0])
    lock = threading.Lock()
    with pytest.raises(CodegenError, match="everything it refers to must be picklable"):
        fj.compile_for("sm_90", lambda x: (x, lock), qkv[0], backward=False)
    with pytest.raises(CodegenError, match="does nothing to a tensor"):
        fj.compile_for("sm_90", lambda x: x, qkv[0], backward=False)
    empty = make_qkv([0, 0], dtype=torch.float32)
    with pytest.raises(CodegenError, match="no tokens"):
        fj.compile_for("sm_90", fj.plan(empty[0]), *empty)


def test_missing_triton_and_an_untested_torch_are_told() -> None:
    plan, qkv = problem()
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(CodegenError, match="triton: must be"),
    ):
        fj.compile_for("sm_90", plan, *qkv)
    with (
        mock.patch.object(torch, "__version__", "9.9.1"),
        pytest.raises(CodegenError, match=r"tested 2\.11, 2\.12, 2\.13"),
    ):
        fj.compile_for("sm_90", plan, *qkv)


@pytest.mark.slow
def test_a_callers_options_go_over_the_plans() -> None:
    plan, qkv = problem()
    options = {"BLOCK_M": 64, "num_warps": 4}
    report = fj.compile_for("sm_90", plan, *qkv, dtype=torch.bfloat16, backward=False, kernel_options=options)
    assert report["forward"].blocks["BLOCK_M"] == 64
    assert report["forward"].num_warps == 4


SCRIPT = """
import torch, flexjag as fj
STEP = 3
def helper(x):
    return x % STEP
def mask(b, h, q, kv):
    return torch.where(helper(q - kv) < 2, q >= kv, q == kv)
x = fj.Jagged.from_lengths(torch.randn(40, 2, 32), [30, 10])
p = fj.plan(x, mask=fj.MaskMod(mask))
r = fj.compile_for("sm_90", p, x, x, x, assemble=False, cache=False, backward=False)
want = fj.attention(x, x, x, plan=p, backend="reference").values
torch.testing.assert_close(r.simulate(x, x, x).out.values, want, atol=1e-5, rtol=1e-5)
"""


@pytest.mark.slow
def test_functions_of_a_script_find_its_globals(tmp_path: Path) -> None:
    import subprocess

    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, x: fj.Jagged) -> fj.Jagged:
        self.calls.add_(1)
        return fj.attention(x, x, x)


@pytest.mark.slow
def test_what_cannot_be_followed_or_fits_nothing_is_refused() -> None:
    _, (q, _, _) = problem(dim=32)
    x = q.with_values(q.values.clone().requires_grad_())
    with Worker() as worker:
        with pytest.raises(CodegenError, match="changes one of its inputs or buffers in place"):
            fj.compile_for("sm_90", Counting(), x, worker=worker, cache=False)
        with pytest.raises(CodegenError, match="makes kernels for sm_90; take another one for sm_80"):
            fj.compile_for("sm_80", lambda y: fj.attention(y, y, y), x, worker=worker, cache=False)
    plan = fj.plan(q)
    report = fj.compile_for("sm_90", plan, q, q, q, assemble=False)
    for grad in (torch.zeros(3), q.values.double(), (q.values, q.values)):
        with pytest.raises(CodegenError, match="grad_out must"):
            report.simulate(q, q, q, grad_out=grad)


def test_an_interrupted_worker_answers_nothing_more() -> None:
    with Worker() as worker:
        with pytest.raises(CodegenError, match="took longer"):
            worker.call("double", 1, timeout=0.0)
        with pytest.raises(CodegenError, match="died"):
            worker.call("double", 21)


@pytest.mark.slow
def test_a_worker_that_dies_or_fails_says_how() -> None:
    with Worker() as worker, pytest.raises(CodegenError, match=r"worker: die died \(SIGKILL\)"):
        worker.call("die")
    with pytest.raises(CodegenError, match="worker: double failed: TypeError: double") as caught:
        call("double")
    assert "Traceback" in str(caught.value.__cause__)
