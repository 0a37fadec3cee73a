"""Ahead-of-time compilation of Triton kernels to machine code, without a GPU. For the worker only.

:func:`assemble` compiles any one Triton kernel; :func:`assemble_wrapper` all kernels of a wrapper that Inductor wrote,
with the options of its launcher. Triton ships its own assembler, so neither needs a CUDA toolkit.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from flexjag.codegen.targets import Target


@dataclass(frozen=True, eq=False)
class Assembled:
    """A compiled Triton kernel.

    Attributes:
        name: Kernel name.
        source: Triton source code, helper functions included.
        asm: Code by compilation stage: ``ttir``, ``ttgir``, ``ptx``, ``cubin``, ... or ``amdgcn``, ``hsaco``.
        constants: Compile-time integers and booleans by name, block sizes included.
        num_warps: Warps per thread block.
        num_stages: Stages of the software pipeline.
        shared_bytes: Shared memory per thread block that a launch requests.
        log: Output of the assembler: registers and spills per function.
        num_configs: Number of configurations that the launcher would autotune over; this is the first.
    """

    name: str
    source: str
    asm: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    shared_bytes: int
    log: str
    num_configs: int = 1


def assemble(
    fn: Any,
    target: Target,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
    attributes: Mapping[Any, Any] | None = None,
) -> Assembled:
    """Compile one ``triton.jit`` function ahead of time.

    Args:
        fn: The ``triton.jit`` function.
        target: The GPU architecture.
        signature: Triton types by argument name: ``{"x_ptr": "*bf16", "n": "i32", "BLOCK": "constexpr"}``.
        constants: Values of the ``constexpr`` arguments by name.
        options: Compiler options: ``num_warps``, ``num_stages``, ...
        attributes: Triton's argument attributes by position: ``{(0,): [["tt.divisibility", 16]]}``.

    Returns:
        The compiled kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kind = "hip" if target.vendor == "amd" else "cuda"
    log = io.StringIO()
    source = ASTSource(fn=fn, signature=dict(signature), constexprs=dict(constants), attrs=dict(attributes or {}))
    with _keep_log(log):
        made = triton.compile(source, target=GPUTarget(kind, target.arch, target.lanes), options=dict(options))
    meta = made.metadata
    return Assembled(
        name=fn.__name__,
        source=fn.src,
        asm=dict(made.asm),
        constants={k: v for k, v in constants.items() if isinstance(v, int | bool)},
        num_warps=meta.num_warps,
        num_stages=getattr(meta, "num_stages", 1),
        shared_bytes=meta.shared,
        log=log.getvalue(),
    )


@contextlib.contextmanager
def _keep_log(log: io.StringIO) -> Iterator[None]:
    """Capture the assembler's report in `log`. Triton prints it on request, and only if its cache is bypassed."""
    from triton import knobs

    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        yield


_CONSTANT = re.compile(r"^    (\w+)\s*: tl\.constexpr = (.+)$", re.MULTILINE)


def assemble_wrapper(source: str, target: Target) -> list[Assembled]:
    """Compile all Triton kernels of one Inductor wrapper, in order of definition."""
    kernels = read_kernels(source)
    made = []
    for name, text, tuner in kernels:
        config = tuner.configs[0]
        meta = tuner._create_compile_meta(config)
        constants = {**meta["constants"]}
        options = tuner._create_compile_options(config, meta)
        one = assemble(tuner.fn, target, meta["signature"], constants, options, meta["configs"][0])
        inside = {k: v for k, v in ((k, _literal(v)) for k, v in _CONSTANT.findall(tuner.fn.src)) if v is not None}
        made.append(
            Assembled(
                **{
                    **vars(one),
                    "name": name,
                    "source": text,
                    "constants": {**inside, **one.constants},
                    "num_configs": len(tuner.configs),
                }
            )
        )
    return made


def _literal(text: str) -> int | bool | None:
    text = text.strip()
    if text in ("True", "False"):
        return text == "True"
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def read_kernels(source: str) -> list[tuple[str, str, Any]]:
    """Name, source and Inductor's launcher of each Triton kernel in a wrapper. Its ``call`` is not executed."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache

    found: list[tuple[str, str, Any]] = []

    def triton(_: Any, name: str, text: str, device_str: str = "cuda") -> None:
        found.append((name, text, getattr(PyCodeCache.load(text), name)))

    with (
        mock.patch.object(AsyncCompile, "triton", triton),
        mock.patch.object(AsyncCompile, "wait", return_value=None),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", create=True, return_value=0),
    ):
        exec(compile(source, "<wrapper>", "exec"), {"__name__": "wrapper"})
    return found
