"""Launch examples of all Triton kernels of the ragged ops, for compilation without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexjag.kernels.launch import KernelCase, note_launches
from flexjag.ops.register import OPERATORS

SEGMENTS, TOKENS, QUERIES, LONG = 256, 65_536, 32, 512
"""Sizes of the examples. Triton specializes only on a size being 1 or divisible by 16."""

Make = Callable[..., Tensor]


def list_kernels(features: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[KernelCase]:
    """Return a launch example of every distinct kernel, ordered by operator.

    Args:
        features: D, also used for E.
        dtype: Dtype of the values: float32, bfloat16 or float16.

    >>> [case.name for case in list_kernels() if "target" in case.op]
    ['target_forward', 'target_of_queries', 'target_of_keys']
    """
    import flexjag.ops  # noqa: F401  defines the operators

    found: dict[object, KernelCase] = {}
    for example, arguments in _examples(features, dtype).items():
        op = OPERATORS[example.split(",")[0]]
        assert op.launcher is not None, example
        for case in note_launches(example, partial(op.launcher, *arguments)):
            found.setdefault(case.key, case)
    return list(found.values())


def _examples(d: int, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Meta arguments of every operator with kernels, keyed by operator name and, after a comma, the variant."""
    s, t, m = SEGMENTS, TOKENS, QUERIES
    offsets = torch.empty(s + 1, dtype=torch.int64, device="meta")
    packed, padded = _empty(t, d, dtype=dtype), _empty(s, LONG, d, dtype=dtype)
    row, square, matrices = _empty(s, d, dtype=dtype), _empty(s, d, d, dtype=dtype), _empty(t * LONG, dtype=dtype)
    wide, factors = _empty(t, d, dtype=torch.float32), _empty(s, dtype=torch.float32)
    query, bias = _empty(s, m, d, dtype=dtype), _empty(s, LONG, m, dtype=dtype)
    return {
        "segment_softmax": (packed, offsets),
        "segment_softmax_backward": (packed, packed, offsets),
        "times_dense": (packed, square, offsets),
        "times_dense, transposed": (packed, square.transpose(1, 2), offsets),
        "gram": (packed, packed, offsets),
        "add_up": (packed, offsets),
        "extreme": (packed, offsets, True, 0.0),
        "extreme, smallest": (packed, offsets, False, 0.0),
        "extreme_backward": (row, packed, row, offsets),
        "spread": (row, offsets, t),
        "pad": (packed, offsets, LONG, 0.0),
        "unpad": (padded, offsets, t, True),
        "multiply": (packed, padded, offsets, True),
        "padded_product": (packed, packed, offsets, LONG),
        "standardize": (wide, offsets, 1e-5, True),
        "standardize, mean square": (wide, offsets, 1e-5, False),
        "standardize_backward": (wide, wide, factors, offsets, True),
        "standardize_backward, mean square": (wide, wide, factors, offsets, False),
        "outer": (packed, packed, offsets, offsets, t * LONG),
        "times_packed": (matrices, packed, offsets, offsets, False, t),
        "times_packed, transposed": (matrices, packed, offsets, offsets, True, t),
        "matrix_softmax": (matrices, offsets, offsets, 1),
        "matrix_softmax, dim 0": (matrices, offsets, offsets, 0),
        "matrix_softmax_backward": (matrices, matrices, offsets, offsets, 1),
        "matrix_softmax_backward, dim 0": (matrices, matrices, offsets, offsets, 0),
        "take": (packed, offsets, offsets, t),
        "put": (packed, offsets, offsets, t),
        "interleave": ([packed, packed], [offsets, offsets]),
        "target": (query, packed, packed, bias, offsets, 1.0),
        "target_backward": (query, query, packed, packed, bias, query, _empty(s, m, dtype=torch.float32), offsets, 1.0),
    }


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
