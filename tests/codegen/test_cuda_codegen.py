"""Where there is a GPU: the kernels made without one are those that run, and simulate what they compute."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from cases import CUDA_ONLY, make_qkv, needing_gradients, on_gpu

import flexjag as fj
from flexjag.codegen.targets import TARGETS
from flexjag.testing import assert_kernels_match, assert_matches_reference

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
    """Both round as the hardware's formats do, in another order: each is as close to float64 as rounding allows."""
    target = own_target()
    mask, score, qkv = problem(dtype)
    assert_kernels_match(fj.plan(qkv[0], mask=mask, score=score), *qkv, target=target, kernel_options={})
    q, k, v = on_gpu(*qkv)
    slopes = score.slopes.detach().cuda().requires_grad_()
    plan = fj.plan(q, mask=mask, score=fj.Alibi(slopes))
    assert_matches_reference(q, k, v, plan=plan, backend="flex", learned=[slopes], norms=True)


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
