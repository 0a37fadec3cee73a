"""Where there is a GPU: the kernels made without one are those that run, and simulate what they compute."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from cases import CUDA_ONLY, check_error, double, make_qkv, needing_gradients, on_gpu

import flexjag as fj
from flexjag.codegen.targets import TARGETS

pytestmark = CUDA_ONLY
LENGTHS = [300, 7, 0, 129, 1, 64]


def own_target() -> str:
    pytest.importorskip("cloudpickle")
    name = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if name not in TARGETS:
        pytest.skip(f"kernels cannot be made for {name}; known: {', '.join(TARGETS)}")
    return name


def problem(dtype: torch.dtype) -> tuple[fj.Mask, fj.Alibi, tuple[fj.Jagged, fj.Jagged, fj.Jagged]]:
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05], requires_grad=True)
    q, k, v = make_qkv(LENGTHS, heads=4, dim=64, dtype=dtype)
    return fj.Causal() & (fj.Window(100, 0) | fj.Prefix(4)), fj.Alibi(slopes), (q, k, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_simulated_and_real_kernels_agree(dtype: torch.dtype) -> None:
    """Both round as the hardware's formats do, in another order: each is as close to float64 as the reference."""
    target = own_target()
    mask, score, qkv = problem(dtype)
    plan = fj.plan(qkv[0], mask=mask, score=score)
    grad = torch.randn_like(qkv[0].values)
    report = fj.compile_for(target, plan, *qkv, assemble=False)
    simulated, grads = report.simulate(*qkv, grad_out=grad)
    leaves = needing_gradients(*on_gpu(*qkv))
    slopes = score.slopes.detach().cuda().requires_grad_()
    real = fj.attention(*leaves, mask=mask, score=fj.Alibi(slopes), backend="flex")
    real.values.backward(grad.cuda())

    def reference(x: tuple[fj.Jagged, ...], g: torch.Tensor) -> list[torch.Tensor]:
        own = needing_gradients(*x)
        held = score.slopes.detach().double().requires_grad_() if g.dtype == torch.float64 else score.slopes
        out = fj.attention(*own, mask=mask, score=fj.Alibi(held), backend="reference").values
        return [out, *torch.autograd.grad(out, [*(t.values for t in own), held], g)]

    exact = reference(tuple(double(x) for x in qkv), grad.double())
    same = reference(qkv, grad)
    names = ["out", "grad_q", "grad_k", "grad_v", "grad_slopes"]
    ours = [simulated.values, *(grads[x] for x in (*(t.values for t in qkv), score.slopes))]
    theirs = [real.values, *(x.values.grad for x in leaves), slopes.grad]
    for name, a, b, s, e in zip(names, ours, theirs, same, exact, strict=True):
        assert b is not None
        check_error(a, s, e, f"simulated {name}", products=grad.numel())
        check_error(b.cpu(), s, e, f"real {name}", products=grad.numel())


def test_predicted_resources_are_the_real_ones() -> None:
    """Registers, shared memory and warps of what Inductor compiles here, and the driver's count of our binaries."""
    import triton

    target = own_target()
    mask, score, qkv = problem(torch.bfloat16)
    plan = fj.plan(qkv[0], mask=mask, score=score)
    report = fj.compile_for(target, plan, *qkv)
    utils = triton.runtime.driver.active.utils
    for kernel in report.kernels:
        loaded = utils.load_binary(kernel.name, kernel.binary, kernel.shared_bytes, torch.cuda.current_device())
        assert loaded[2] == kernel.registers, kernel.name
        assert loaded[3] * 4 <= kernel.stack_bytes, kernel.name  # the driver counts words of local memory

    made: list[Any] = []
    compile_kernel = triton.compile

    def record(*args: Any, **kwargs: Any) -> Any:
        made.append(compile_kernel(*args, **kwargs))
        return made[-1]

    leaves = needing_gradients(*on_gpu(*qkv))
    slopes = score.slopes.detach().cuda().requires_grad_()
    torch._dynamo.reset()
    own_process = {"compile_threads": 1, "force_disable_caches": True}
    with mock.patch("triton.compile", record), torch._inductor.config.patch(own_process):  # type: ignore[attr-defined]
        out = fj.attention(*leaves, mask=mask, score=fj.Alibi(slopes), backend="flex")
        out.values.sum().backward()
    real = {(m.metadata.shared, m.metadata.num_warps) for m in made if "_tem_" in m.metadata.name}
    predicted = {(k.shared_bytes, k.num_warps) for k in report.kernels if k.phase in ("forward", "backward")}
    assert real == predicted
