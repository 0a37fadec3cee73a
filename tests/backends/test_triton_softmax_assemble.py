"""The Triton kernels of the softmax, compiled for GPUs that are not here: they fit, and nothing spills."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from flexjag.codegen.own.softmax import list_kernels
from flexjag.codegen.read.measure import Usage
from flexjag.codegen.targets import TARGETS, get_target
from flexjag.codegen.worker import Worker

HERE = __name__
IS_LONG = settings._current_profile == "nightly"
KERNELS = {"softmax_forward", "softmax_of_queries", "softmax_of_keys"}


@pytest.fixture(scope="module")
def assembler() -> Iterator[Worker]:
    with Worker() as running:
        yield running


def assemble(target: str, features: list[int], dtypes: list[torch.dtype], examples: list[str]) -> list[Usage]:
    """What the kernels of some examples take, each code once; in a worker."""
    import warnings

    from flexjag.codegen.make.assemble import assemble
    from flexjag.codegen.read.measure import read_usage

    warnings.filterwarnings("ignore")
    made: dict[object, Usage] = {}
    gpu = get_target(target)
    for d in features:
        for dtype in dtypes:
            for case in list_kernels(d, dtype):
                if case.op in examples and case.key not in made:
                    one = assemble(case.fn, gpu, case.signature, case.constants, case.options, case.attributes)
                    made[case.key] = read_usage(one, gpu, f"{case.op}, D {d}, {dtype}")
    return list(made.values())


@pytest.mark.slow
@pytest.mark.parametrize("target", [name for name in TARGETS if name.startswith("sm_")])
def test_assembles_without_spills(target: str, assembler: Worker) -> None:
    """In CI an example that needs many registers; nightly all of them, with few and many features."""
    features, dtypes, examples = [128], [torch.bfloat16], ["groups, slopes"]
    if IS_LONG:
        features, dtypes = [16, 64, 128], [torch.bfloat16, torch.float16]
        examples = sorted({case.op for case in list_kernels()})
    kernels = assembler.call("call_function", HERE, "assemble", target, features, dtypes, examples)
    assert {kernel.name for kernel in kernels} == KERNELS
    for kernel in kernels:
        where = f"{kernel.name} of {kernel.phase} on {target}"
        assert kernel.spilled_bytes == 0, f"{where} spills {kernel.spilled_bytes} B"
        assert kernel.resident_blocks > 0, where
        assert kernel.tensor_cores, where


def test_kernels_are_listed_in_every_height_and_use_no_atomics() -> None:
    cases = list_kernels()
    rows = {name: {case.constants["ROWS"] for case in cases if case.name == name} for name in KERNELS}
    assert rows == {
        "softmax_forward": {8, 16, 32, 64},
        "softmax_of_queries": {8, 16, 32, 64},
        "softmax_of_keys": {16, 32, 64},
    }
    assert not [case.name for case in cases if "atomic" in case.fn.src]
