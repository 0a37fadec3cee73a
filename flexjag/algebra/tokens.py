"""Masks by one bool per token: keys that all may attend, queries that may attend all."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag.algebra.masks import Mask
from flexjag.algebra.node import along, check_tensor, node
from flexjag.errors import MaskError, explain_values


@node
class Keys(Mask):
    """The keys that are marked, whatever the query.

    ``Causal() & Keys(valid)`` leaves out keys that hold nothing; ``Window(64, 64) | Keys(g) | Queries(g)`` has global
    tokens anywhere (Longformer, arXiv 2004.05150).

    Args:
        marked: ``[T_kv]`` bool per packed key token.

    >>> Keys(torch.tensor([True, False, True]))
    Keys(<bool[3]>)
    """

    printable = True
    reads_pairs = False

    marked: Tensor = along("key token")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_marks(self.marked)


@node
class Queries(Mask):
    """Every key of the own segment for the queries that are marked, none for the others.

    Args:
        marked: ``[T_q]`` bool per packed query token.
    """

    printable = True
    reads_pairs = False

    marked: Tensor = along("query token")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_marks(self.marked)


def _check_marks(marked: Tensor) -> None:
    check_tensor(MaskError, "marked", marked)
    if marked.ndim != 1 or marked.dtype != torch.bool:
        seen = {"shape": tuple(marked.shape), "dtype": marked.dtype}
        raise MaskError(explain_values("marked", "must be a 1-D bool tensor, one entry per packed token", **seen))
