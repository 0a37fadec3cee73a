"""Launching of our own Triton kernels, and recording of launches for compilation without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
"""True if Triton is installed. Looked up once: TorchDynamo of torch 2.11 cannot trace the lookup."""

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Input dtypes that the kernels support, with their short names. Plain torch computes in the others."""

NAMES = {
    **DTYPES,
    torch.bool: "i1",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.float64: "fp64",
}
"""Triton's names of the dtypes that pointers may have."""


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: The ``triton.jit`` function.
        grid: Number of programs per axis.
        arguments: Run-time arguments by name: tensors, numbers, and tuples of them.
        constants: Compile-time arguments by name.
        num_warps: Warps per program.
        num_stages: Stages of the software pipeline.
        maxnreg: Limit of registers per thread, on NVIDIA's GPUs; None leaves it to their assembler.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None


ALL_REGISTERS = 255
"""Value of `maxnreg` that avoids spills.

Without a limit, NVIDIA's assembler spills a few of up to 255 registers to fit one more block on a multiprocessor.
"""

recorded: list[Launch] = []
"""Launches on meta tensors, which are recorded here instead of made: see :func:`note_launches`."""


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], **constants: Any) -> None:
    """Launch a kernel on the device of its first argument, unless the grid is empty.

    Args:
        kernel: The ``triton.jit`` function.
        grid: Number of programs per axis.
        arguments: Run-time arguments by name, a tensor first; tensors of any strides have two dimensions or more.
        constants: Compile-time arguments, and ``num_warps``, ``num_stages`` and ``maxnreg``.
    """
    if 0 in grid:
        return
    maxnreg = constants.pop("maxnreg", None)
    arguments = {name: _packed(value) for name, value in arguments.items()}
    device = next(iter(arguments.values())).device
    if device.type == "meta":
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
        recorded.append(Launch(kernel, grid, arguments, constants, **options, maxnreg=maxnreg))
        return
    if maxnreg is not None and device.type == "cuda" and torch.version.hip is None:
        constants["maxnreg"] = maxnreg
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, **{"num_stages": Launch.num_stages, **constants})


def _packed(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) and value.ndim == 1 else value


@dataclass(frozen=True, eq=False)
class KernelCase:
    """One kernel, with everything that determines its code.

    Attributes:
        op: The operator that launches it and, after a comma, the example's special property.
        name: Name of the kernel.
        fn: The ``triton.jit`` function.
        signature: Types of the arguments, as Triton names them.
        constants: Values of the compile-time arguments.
        options: ``num_warps``, ``num_stages`` and, where it is set, ``maxnreg``.
        attributes: Properties that Triton assumes of arguments, such as divisibility by 16, by position.
    """

    op: str
    name: str
    fn: Any
    signature: Mapping[str, Any]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    attributes: Mapping[Any, Any]

    @property
    def key(self) -> tuple[object, ...]:
        """Key that is equal for kernels with the same code."""
        given = (self.signature, self.constants, self.options, self.attributes)
        return self.name, *(repr(sorted(x.items())) for x in given)


def note_launches(op: str, run: Callable[[], object]) -> list[KernelCase]:
    """Record the kernels that a function of meta tensors launches."""
    recorded.clear()
    run()
    cases = [_case(op, made) for made in recorded]
    recorded.clear()
    return cases


def _case(op: str, made: Launch) -> KernelCase:
    """Specialize a launch as Triton's launcher would: 1 becomes a constant; 16 may divide sizes and addresses."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = dict(made.constants)
    attributes: dict[Any, Any] = {}
    divisible = [["tt.divisibility", 16]]
    for at, parameter in enumerate(made.kernel.params):
        value = made.arguments.get(parameter.name)

        def kind_of(value: Any, place: tuple[int, ...], parameter: Any = parameter) -> Any:
            if isinstance(value, tuple):
                return tuple(kind_of(x, (*place, i)) for i, x in enumerate(value))
            if isinstance(value, Tensor):
                attributes[place] = divisible
                return f"*{NAMES[value.dtype]}"
            if isinstance(value, float):
                return "fp32"
            is_special = len(place) > 1 or not parameter.do_not_specialize  # which Triton ignores in a tuple
            if value == 1 and is_special:
                constants[place if len(place) > 1 else parameter.name] = 1
                return "constexpr"
            if value % 16 == 0 and is_special:
                attributes[place] = divisible
            return "i32"

        signature[parameter.name] = "constexpr" if parameter.is_constexpr else kind_of(value, (at,))
    options = {"num_warps": made.num_warps, "num_stages": made.num_stages}
    options |= {} if made.maxnreg is None else {"maxnreg": made.maxnreg}
    return KernelCase(op, made.kernel.fn.__name__, made.kernel, signature, constants, options, attributes)


def ceil_div(n: int, by: int) -> int:
    """Quotient ``n / by`` rounded up."""
    return -(-n // by)


def power_of_2(n: int, low: int = 1, high: int = 2**30) -> int:
    """Smallest power of 2 that is at least `n`, clamped to `low` ... `high`."""
    return max(low, min(high, 1 << (max(n, 1) - 1).bit_length()))


def precision(dtype: torch.dtype) -> str:
    """Input precision of matrix products, ``"tf32"`` or ``"ieee"``: for float32 the user's setting for cuBLAS."""
    is_rounded = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if is_rounded else "ieee"
