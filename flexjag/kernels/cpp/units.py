"""What units of C++ begin with."""

from __future__ import annotations

import torch

ELEMENTS = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
"""C++ types of the numbers in memory, by dtype."""


def heading(dtype: torch.dtype, constants: str = "") -> str:
    """The beginning of a unit that reads and writes a dtype.

    Args:
        dtype: One of :data:`ELEMENTS`.
        constants: Further definitions, which the headers use.

    Returns:
        Definitions of `element`, of `real`, in which the unit computes, and of `constants`.
    """
    real = "double" if dtype == torch.float64 else "float"
    known = "#define ELEMENT_IS_BFLOAT16\n" if dtype == torch.bfloat16 else ""  # for the preprocessor
    types = f"using real = {real};\nstruct float16;\nstruct bfloat16;\nusing element = {ELEMENTS[dtype]};\n"
    return f"{known}#include <cstdint>\nnamespace flexjag {{\n{types}{constants}}}\n"
