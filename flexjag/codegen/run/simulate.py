"""Run Inductor's wrappers on the CPU, their kernels in Triton's interpreter. For workers with TRITON_INTERPRET=1."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from flexjag.codegen.make.assemble import read_kernels
from flexjag.codegen.run.interpreter import Libdevice, mend_interpreter

_ON_CPU = (  # device-specific code of a wrapper, and its replacement on a CPU
    ("empty_strided_cuda(", "empty_strided_cpu("),
    ("torch.cuda.set_device(0)", "pass"),
    ("with torch.cuda._DeviceGuard(0):", "if True:"),
    ("device(type='cuda', index=0)", "device('cpu')"),
    ("device='cuda:0'", "device='cpu'"),
)


_DEFINITION = re.compile(r"async_compile\.triton\(\s*'(\w+)', '''.*?''', device_str='cuda'\)", re.DOTALL)


def simulate(
    wrappers: Mapping[str, str], wiring: Any, tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[list[Any], dict[int, Tensor]]:
    """Run the forward wrapper and, if there is one, the backward wrapper.

    Args:
        wrappers: Wrapper sources by phase.
        wiring: The inputs and outputs of the two wrappers (:class:`flexjag.codegen.make.capture.Wiring`).
        tensors: The payload's tensors, on the CPU.
        tangents: The gradient of each output; None for an output without one.

    Returns:
        The outputs, and gradients by the index of their tensor in `tensors`.
    """
    mend_interpreter()
    inputs = [tensors[i] if kind == "tensor" else i for kind, i in wiring.inputs]
    outputs = _call(wrappers["forward"], inputs)
    returned = outputs[: wiring.num_outputs]
    if "backward" not in wrappers:
        return returned, {}
    saved = dict(zip(wiring.output_names, outputs, strict=True))
    given = iter(_tangents(returned, wiring.needs_grad, tangents))
    backward = [next(given) if name.startswith("tangents") else saved[name] for name in wiring.backward_inputs]
    grads = _call(wrappers["backward"], backward)
    sources = zip(wiring.inputs, grads, strict=True)
    return returned, {i: grad for (kind, i), grad in sources if kind == "tensor" and grad is not None}


def _tangents(outputs: Sequence[Any], needed: Sequence[bool], given: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients of the differentiable outputs, contiguous as AOTAutograd expects them.

    Raises:
        ValueError: If their number, a shape or a dtype differs from the outputs'.
    """
    if len(given) != len(outputs):
        raise ValueError(f"grad_out must have one gradient for each of the {len(outputs)} outputs, got {len(given)}")
    made = []
    for out, grad in ((o, g) for o, g, n in zip(outputs, given, needed, strict=True) if n):
        if grad is None or grad.shape != out.shape or grad.dtype != out.dtype:
            seen = None if grad is None else (list(grad.shape), grad.dtype)
            raise ValueError(f"grad_out must be like the output, {list(out.shape)} {out.dtype}, got {seen}")
        made.append(grad.contiguous())
    return made


def _call(source: str, inputs: Sequence[Any]) -> list[Any]:
    with (
        mock.patch("torch._inductor.runtime.triton_heuristics.cached_autotune", _untuned),
        mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu", return_value=None),
        mock.patch("torch._inductor.runtime.triton_helpers.libdevice", Libdevice()),
    ):
        kernels = {name: _InterpretedKernel(tuned) for name, _, tuned in read_kernels(source)}
    for there, here in _ON_CPU:
        source = source.replace(there, here)
    source = _DEFINITION.sub(r"_kernels['\1']", source)
    scope: dict[str, Any] = {"__name__": "wrapper", "_kernels": kernels}
    with mock.patch.object(torch._C, "_cuda_getCurrentRawStream", create=True, return_value=0):
        exec(compile(source, "<wrapper>", "exec"), scope)
    call = scope["call"] if "call" in scope else scope["Runner"](partitions=[]).call
    return list(call(list(inputs)))


def _untuned(size_hints: Any, configs: Any, triton_meta: Any, heuristic_type: Any, **rest: Any) -> Any:
    """Stand-in for Inductor's ``cached_autotune`` that keeps a kernel's launch parameters and compiles nothing."""

    def decorate(fn: Any) -> SimpleNamespace:
        meta = rest.get("inductor_meta") or {}
        return SimpleNamespace(fn=fn, configs=configs, triton_meta=triton_meta, inductor_meta=meta)

    return decorate


class _InterpretedKernel:
    """One kernel in Triton's interpreter, with the interface of Inductor's launcher."""

    def __init__(self, tuned: Any) -> None:
        self.fn, self.meta, self.inductor_meta = tuned.fn, tuned.triton_meta, tuned.inductor_meta
        annotated = self.fn.fn.__annotations__.items()
        self.constexprs = {name for name, kind in annotated if "constexpr" in str(kind)}
        # All configurations are correct. The largest blocks run fastest: interpretation is slow per program.
        self.config = max(tuned.configs, key=lambda c: [v for v in c.kwargs.values() if isinstance(v, int)])

    def run(self, *args: Any, stream: Any = None) -> None:
        from torch._inductor.runtime.triton_heuristics import GridExpr

        fixed = {k: v for k, v in self.meta.get("constants", {}).items() if k in self.constexprs}
        fixed |= self.config.kwargs
        names = [name for name in self.fn.arg_names if name not in fixed]
        names += self.inductor_meta.get("extra_launcher_args", [])
        given = {**dict(zip(names, args, strict=True)), **fixed}
        grid = GridExpr.from_meta(self.inductor_meta, self.config).eval_slow(given)
        if all(grid):
            self.fn[grid](**{name: x for name, x in given.items() if name in self.fn.arg_names})
