"""How our own Triton kernels are launched, or only noted, for compilers that run without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
"""Whether Triton is installed. Looked up once: TorchDynamo of torch 2.11 cannot trace the question."""

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""What the kernels compute with. All else is left to plain torch."""

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
"""What Triton calls the dtypes that pointers may have."""


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: The ``triton.jit`` function.
        grid: Programs per axis.
        arguments: By name; tensors, numbers, and tuples of them.
        constants: The compile-time ones.
        num_warps: Warps of a program.
        num_stages: Stages of the software pipeline.
        maxnreg: Registers that a thread may have, on NVIDIA's GPUs; None leaves it to their assembler.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None


ALL_REGISTERS = 255
"""Left alone, NVIDIA's assembler spills a few of up to 255 registers to fit one more block on a multiprocessor."""

recorded: list[Launch] = []
"""Launches on meta tensors, which are noted here and not made: see :func:`note_launches`."""


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], **constants: Any) -> None:
    """Launch a kernel on the device of its first argument, unless the grid is empty.

    Args:
        kernel: The ``triton.jit`` function.
        grid: Programs per axis.
        arguments: By name, a tensor first; those that may have any strides have two dimensions or more.
        constants: The compile-time ones, and ``num_warps``, ``num_stages`` and ``maxnreg``.
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
    """One kernel, with what decides its code.

    Attributes:
        op: The operator that launches it and, after a comma, what is special about the example.
        name: Of the kernel.
        fn: The ``triton.jit`` function.
        signature: Argument types in Triton's words.
        constants: The values of the compile-time arguments.
        options: ``num_warps``, ``num_stages`` and, where it is set, ``maxnreg``.
        attributes: What Triton knows of arguments, by position.
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
        """Equal for kernels with the same code."""
        given = (self.signature, self.constants, self.options, self.attributes)
        return self.name, *(repr(sorted(x.items())) for x in given)


def note_launches(op: str, run: Callable[[], object]) -> list[KernelCase]:
    """The kernels that a function of meta tensors launches."""
    recorded.clear()
    run()
    cases = [_case(op, made) for made in recorded]
    recorded.clear()
    return cases


def _case(op: str, made: Launch) -> KernelCase:
    """What Triton's launcher would make of the arguments: 1 is a constant, 16 divides sizes and addresses."""
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
    """The quotient, rounded up."""
    return -(-n // by)


def power_of_2(n: int, low: int = 1, high: int = 2**30) -> int:
    """The next power of 2, within bounds."""
    return max(low, min(high, 1 << (max(n, 1) - 1).bit_length()))


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are made: as the user chose for cuBLAS."""
    is_rounded = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if is_rounded else "ieee"
