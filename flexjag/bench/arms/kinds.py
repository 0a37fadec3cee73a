"""The masks and scores of the attention suite, as flexjag's nodes and as predicates of positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from flexjag.algebra.masks import Causal, Full, Mask, Prefix, Window

MAX_DISTANCE = 128  # of the relative bias


@dataclass(frozen=True)
class Kind:
    """A mask and a score.

    Attributes:
        mask: The mask as a flexjag node.
        allowed: The same mask as a predicate of query and key positions i and j, which broadcast.
        score: ``"alibi"``, ``"relative bias"`` (trained) or None.
    """

    mask: Mask
    allowed: Callable[[Tensor, Tensor], Tensor]
    score: str | None = None


KINDS = {
    "full": Kind(Full(), lambda i, j: (i >= 0) & (j >= 0)),
    "causal": Kind(Causal(), lambda i, j: j <= i),
    "window": Kind(Window(128, 0), lambda i, j: (i - 128 <= j) & (j <= i)),
    "prefix-LM": Kind(Causal() | Prefix(64), lambda i, j: (j <= i) | (j < 64)),
    "window | prefix + ALiBi": Kind(
        Window(128, 0) | Prefix(4), lambda i, j: ((i - 128 <= j) & (j <= i)) | (j < 4), "alibi"
    ),
    "causal + trained relative bias": Kind(Causal(), lambda i, j: j <= i, "relative bias"),
}


def useful_flops(kind: str, lengths: Sequence[int], heads: int, dim: int, backward: bool) -> int:
    """Floating-point operations that a mask requires: 4·H·D per allowed score, and 2.5 times that backward."""
    useful = 4 * heads * dim * _scores(kind, tuple(lengths))
    return useful * 7 // 2 if backward else useful


@cache
def _scores(kind: str, lengths: tuple[int, ...]) -> int:
    """Number of allowed scores in all segments."""
    i = torch.arange(max(lengths))
    allowed = KINDS[kind].allowed(i[:, None], i[None])
    # Position p adds the keys up to p of query p, and the queries before p of key p.
    before = allowed.tril().sum(1) + allowed.triu(1).sum(0)
    within = torch.cat([torch.zeros(1, dtype=torch.int64), before.cumsum(0)])
    return int(within[torch.tensor(lengths)].sum())
