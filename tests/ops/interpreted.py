"""What a worker with Triton's interpreter runs: the ragged ops on CPU tensors, through their Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from ops_table import OPS, both
from test_ops import with_gradients
from torch import Tensor

import flexjag.ops  # noqa: F401  defines the operators
from flexjag.codegen.run.interpreter import mend_interpreter
from flexjag.ops.register import OPERATORS, interpret_kernels

Found = tuple[list[Tensor], list[Tensor]]


@cache
def prepare() -> None:
    torch.set_num_threads(1)
    mend_interpreter()
    interpret_kernels()


def run_op(name: str, lengths: Sequence[int], operands: list[Tensor]) -> Found:
    """The results and gradients of an op of the table."""
    prepare()
    a, b = both(lengths, torch.int32 if len(lengths) % 2 else torch.int64)
    return with_gradients(lambda *t: OPS[name].run(a, b, *t), operands)


def run_batches(name: str, batches: Sequence[list[int]], dtype: torch.dtype) -> list[Found]:
    """The same on the operands of each batch."""
    return [run_op(name, lengths, OPS[name].operands(lengths, dtype)) for lengths in batches]


def run_operator(name: str, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """The results of one operator."""
    prepare()
    out = OPERATORS[name](*arguments)
    return (out,) if isinstance(out, Tensor) else tuple(out)
