"""Assertion that the GPU kernels compiled for a plan agree with the reference, without a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flexjag.api.plan import Plan
from flexjag.codegen.compile import compile_for
from flexjag.codegen.worker import Worker
from flexjag.jagged import Jagged
from flexjag.testing.oracle import Result, Trial, check_against_reference

QUICK = {f"{name}": 128 for name in ("fwd_BLOCK_M", "fwd_BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1")}
QUICK |= {"bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 128}
"""The largest blocks, for speed: the interpreter's time is proportional to the number of blocks."""


def assert_kernels_match(
    plan: Plan,
    q: Jagged,
    k: Jagged,
    v: Jagged,
    *,
    target: str = "sm_90",
    backward: bool = True,
    scale: float | None = None,
    learned: Sequence[Tensor] | None = None,
    kernel_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    worker: Worker | None = None,
) -> dict[str, float]:
    """Assert that the GPU kernels of a plan agree with the dense float64 reference, forward and backward.

    FlexAttention's kernels are lowered for the target and run in Triton's interpreter, which takes seconds: use a few
    hundred tokens. Errors are bounded elementwise as in :func:`~flexjag.testing.assert_matches_reference`, and in norm.

    Args:
        plan: The plan.
        q: ``[T_q, H, D]``.
        k: ``[T_kv, G, D]``.
        v: ``[T_kv, G, E]``.
        target: The GPU, see :func:`flexjag.compile_for`.
        backward: Whether to compare the gradients of q, k, v and `learned` as well.
        scale: Factor on ``q·k``. Default ``1 / sqrt(D)``.
        learned: The tensors in the score whose gradients are compared. Default: those found in it.
        kernel_options: FlexAttention's kernel options. Default: the largest blocks, for speed; ``{}`` for the plan's.
        seed: Seed of the weights of the loss.
        worker: A running interpreter process to reuse. Default: start one.

    Returns:
        The largest ratio of error to allowed error for each tensor compared: ``out``, ``lse``, ``grad_q``, ...

    Raises:
        AssertionError: If a tensor is outside its bound, naming each with its error, bound and index.
        CodegenError: If the kernels cannot be compiled or run.

    Example:
        ``assert_kernels_match(plan(x, mask=Causal()), x, x, x)``
    """
    q, k, v = (x.with_values(x.values.detach().clone()) for x in (q, k, v))  # three inputs, also of one tensor
    trial = Trial.make(q, k, v, plan, scale, learned, lse=True, backward=backward, seed=seed)

    def run(exact: Result) -> Result:
        options = QUICK if kernel_options is None else kernel_options
        report = compile_for(
            target, plan, q, k, v, backward=backward, scale=trial.scale, return_lse=True, kernel_options=options,
            assemble=False, worker=worker,
        )  # fmt: skip
        finite = torch.isfinite(exact.lse)
        tangents = (trial.grad_out, torch.where(finite, trial.grad_lse.to(torch.float32), 0.0)) if backward else None
        (out, lse), grads = report.simulate(q, k, v, grad_out=tangents, worker=worker)
        wanted = [q.values, k.values, v.values, *trial.learned] if backward else []
        return Result(out.values, lse.values, [grads[x] for x in wanted])

    return check_against_reference(trial, run, f"flex on {target}", q.values.dtype, norms=True)
