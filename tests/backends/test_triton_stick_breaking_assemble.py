"""The Triton kernels of stick-breaking attention, compiled for GPUs that are not here: they fit, and nothing spills."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from flexjag.backends.triton.stick_breaking_kernels import find_spoiled
from flexjag.codegen.own.attention import list_kernels
from flexjag.codegen.read.measure import Usage
from flexjag.codegen.targets import TARGETS, get_target
from flexjag.codegen.worker import Worker

HERE = __name__
IS_LONG = settings._current_profile == "nightly"


@pytest.fixture(scope="module")
def assembler() -> Iterator[Worker]:
    with Worker() as running:
        yield running


def assemble(target: str, features: list[int], dtypes: list[torch.dtype], examples: list[str]) -> list[Usage]:
    """What the kernels take, each code once; in a worker."""
    import warnings

    from flexjag.codegen.make.assemble import assemble
    from flexjag.codegen.read.measure import read_usage

    warnings.filterwarnings("ignore")
    made: dict[object, Usage] = {}
    gpu = get_target(target)
    for d in features:
        for dtype in dtypes:
            for case in list_kernels(d, dtype):
                if (case.op in examples or case.fn is find_spoiled) and case.key not in made:
                    one = assemble(case.fn, gpu, case.signature, case.constants, case.options, case.attributes)
                    made[case.key] = read_usage(one, gpu, f"{case.op}, D {d}, {dtype}")
    return list(made.values())


EXAMPLES = [
    "stick_breaking",
    "stick_breaking, sinks, cap",
    "stick_breaking, own key, remainder, slopes",
    "stick_breaking, position and time bias",
]
KERNELS = {"find_spoiled", "stick_breaking", "sum_right", "of_queries", "of_keys"}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_assembles_without_spills(target: str, assembler: Worker) -> None:
    """In CI an example that needs many registers; nightly all of them, with few and many features."""
    features, dtypes, examples = [128], [torch.bfloat16], EXAMPLES[1:2]
    if target == "sm_90":
        dtypes = [torch.float32, torch.bfloat16]
    if IS_LONG:
        features, dtypes, examples = [64, 128], [torch.float32, torch.bfloat16, torch.float16], EXAMPLES
    kernels = assembler.call("call_function", HERE, "assemble", target, features, dtypes, examples)
    assert {kernel.name for kernel in kernels} == KERNELS
    for kernel in kernels:
        where = f"{kernel.name} of {kernel.phase} on {target}"
        assert kernel.spilled_bytes == 0, f"{where} spills {kernel.spilled_bytes} B"
        assert kernel.resident_blocks > 0, where
        if kernel.name != "find_spoiled" and "bfloat16" in kernel.phase:
            assert kernel.tensor_cores, where


def test_no_kernel_uses_atomics() -> None:
    cases = [case for case in list_kernels() if case.op.startswith("stick_breaking")]
    assert {case.op for case in cases} == set(EXAMPLES)
    assert {case.name for case in cases} == KERNELS
    assert not [case.name for case in cases if "atomic" in case.fn.src]
