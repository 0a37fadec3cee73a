"""The jobs of a worker: functions that it runs on request. They may patch their process, and nothing undoes it."""

from __future__ import annotations

import importlib
import os
import signal
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexjag.codegen.payload import Meta
from flexjag.codegen.report import Kernel, phase_of
from flexjag.codegen.targets import Target

if TYPE_CHECKING:
    from flexjag.codegen.read.measure import Usage


def double(x: Any) -> Any:
    """Return ``x + x``: a test that a worker answers."""
    return x + x


def die() -> None:
    """Kill this process: a test that a dead worker is noticed."""
    os.kill(os.getpid(), signal.SIGKILL)


def call_function(module: str, function: str, *args: Any) -> Any:
    """Call a function of an importable module by name."""
    return getattr(importlib.import_module(module), function)(*args)


def assemble_ops(
    target: Target,
    features: Sequence[int],
    dtypes: Sequence[torch.dtype],
    names: Sequence[str] | None = None,
    listing: str = "flexjag.codegen.own.ops",
) -> list[Usage]:
    """Compile our own Triton kernels and return their resource usage, once per distinct code.

    Args:
        target: The GPU architecture.
        features: Numbers of features D to compile for.
        dtypes: Dtypes to compile for.
        names: Names of the kernels to compile. Default: all.
        listing: The module whose ``list_kernels`` lists the kernels. Default: that of the ragged ops.

    Returns:
        One record per code, whose `phase` names the op, D and the dtype (:func:`phase_of_case`).
    """
    from flexjag.codegen.make.assemble import assemble
    from flexjag.codegen.read.measure import read_usage

    warnings.filterwarnings("ignore")
    list_kernels = importlib.import_module(listing).list_kernels
    made: dict[object, Usage] = {}
    for d in features:
        for dtype in dtypes:
            for case in list_kernels(d, dtype):
                if case.key not in made and (names is None or case.fn.__name__ in names):
                    one = assemble(case.fn, target, case.signature, case.constants, case.options, case.attributes)
                    made[case.key] = read_usage(one, target, phase_of_case(case.op, d, dtype))
    return list(made.values())


def phase_of_case(op: str, features: int, dtype: torch.dtype) -> str:
    """Label of one of our own kernels: the op and its example, D and the dtype."""
    return f"{op}, D {features}, {str(dtype).removeprefix('torch.')}"


_settled: list[Target] = []


def _settle(target: Target) -> None:
    """Make this process report the GPU `target`.

    Raises:
        ValueError: If it already reports another one: PyTorch caches the properties of the first.
    """
    from flexjag.codegen.make.pretend import pretend

    if not _settled:
        warnings.filterwarnings("ignore")
        pretend(target)
        _settled.append(target)
    elif _settled != [target]:
        raise ValueError(f"this worker makes kernels for {_settled[0].name}; take another one for {target.name}")


def make(
    structure: bytes,
    metas: Sequence[Meta],
    target: Target,
    backward: bool,
    kernel_options: Mapping[str, Any],
    precision: str,
    assemble: bool,
) -> tuple[dict[str, str], Any, list[Kernel]]:
    """Capture, lower and, if `assemble`, assemble a function: wrapper sources by phase, their wiring, the kernels."""
    from flexjag.codegen.make.capture import capture
    from flexjag.codegen.make.lower import lower

    torch._dynamo.reset()
    _settle(target)
    torch.set_float32_matmul_precision(precision)
    graphs, wiring = capture(structure, metas, backward, dict(kernel_options))
    wrappers = lower(graphs)
    if not assemble:
        return wrappers, wiring, []
    from flexjag.codegen.make.assemble import assemble_wrapper
    from flexjag.codegen.read.measure import measure

    made = [(phase, one) for phase, text in wrappers.items() for one in assemble_wrapper(text, target)]
    return wrappers, wiring, [measure(one, target, phase_of(phase, one.name)) for phase, one in made]


def simulate(wrappers: Mapping[str, str], wiring: Any, tensors: Path) -> tuple[list[Any], dict[int, Any]]:
    """Run wrappers in Triton's interpreter on the inputs and output gradients saved in the file `tensors`."""
    from flexjag.codegen.run import simulate as run

    warnings.filterwarnings("ignore")
    given, tangents = torch.load(tensors, weights_only=True)
    return run.simulate(wrappers, wiring, given, tangents)
