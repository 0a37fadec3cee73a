"""All Triton kernels of the ragged ops, compiled for GPUs that are not here: they fit, and no register spills."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from flexjag.codegen.own.ops import list_kernels
from flexjag.codegen.read.measure import Usage
from flexjag.codegen.targets import TARGETS, get_target
from flexjag.codegen.worker import Worker
from flexjag.ops.register import OPERATORS

FEATURES = [64, 128]
IS_LONG = settings._current_profile == "nightly"
DTYPES = [torch.float32, torch.bfloat16, *([torch.float16] if IS_LONG else [])]
HARDEST = ["multiply_segments", "target_forward", "target_of_queries", "target_of_keys"]
"""Those that need the most registers and shared memory."""

TENSOR_CORES = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
"""What products of half precision are made with where the tiles are large enough."""


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as running:
        yield running


def check(kernel: Usage, target: str) -> None:
    where = f"{kernel.name} of {kernel.phase} on {target}"
    assert 0 < kernel.registers <= (512 if get_target(target).vendor == "amd" else 255), where
    assert kernel.spilled_bytes == 0, f"{where} spills {kernel.spilled_bytes} B"
    assert kernel.shared_bytes <= get_target(target).shared_per_block, f"{where} asks for {kernel.shared_bytes} B"
    assert kernel.resident_blocks > 0, where


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_assembles_without_spills(target: str, worker: Worker) -> None:
    is_whole = IS_LONG or target in ("sm_90", "gfx942")
    names, features = (None, FEATURES) if is_whole else (HARDEST, FEATURES[-1:])
    kernels = worker.call("assemble_ops", get_target(target), features, DTYPES, names)
    assert {k.name for k in kernels} == {c.name for c in list_kernels() if is_whole or c.name in HARDEST}
    for kernel in kernels:
        check(kernel, target)
    halves = [k for k in kernels if k.name in HARDEST and "bfloat16" in k.phase]
    assert halves
    assert all(k.tensor_cores for k in halves)
    assert TENSOR_CORES[target] in {core for k in halves for core in k.tensor_cores}


PLAIN = ("repeat_arange", "sorted_unique", "true_at")
"""Operators of FBGEMM's names that give integers; they are there once something has imported those."""


def test_every_operator_has_its_kernels() -> None:
    own = {name: op for name, op in OPERATORS.items() if name not in PLAIN}
    assert {case.op.split(",")[0] for case in list_kernels()} == set(own)
    assert all(op.launcher is not None for op in own.values())


@pytest.mark.slow
def test_no_kernel_uses_atomics() -> None:
    assert not [case.name for case in list_kernels() if "atomic" in case.fn.src]
