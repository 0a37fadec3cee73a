"""Score nodes: what happens to ``scale * q·k`` before the normalizer, composed left to right by ``>>``.

Positions are segment-local. A score may hold tensors that need gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexjag.errors import ScoreError, explain_values
from flexjag.nodes import Node, node

ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Score(Node):
    """Base class of every score node."""

    def __rshift__(self, other: object) -> Score:
        if not isinstance(other, Score):
            raise ScoreError(explain_values("score", "both sides of >> must be scores", other=type(other).__name__))
        return Then(self, other)


@node
class ScoreMod(Score):
    """A function in FlexAttention's own signature, ``fn(score, b, h, q_pos, kv_pos) -> score``.

    Positions are segment-local and `b` is the segment. Tensors that `fn` closes over get gradients.
    Positions are clamped into the segment, so a lookup by position never reads out of bounds.
    """

    fn: ScoreFunction

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise ScoreError(explain_values("fn", "must be callable as fn(score, b, h, q_pos, kv_pos)", fn=self.fn))


@node
class Alibi(Score):
    """Attention with linear biases: ``s + slopes[h] * (j - i)`` (arXiv 2108.12409).

    Args:
        slopes: ``[H]`` floating point, may need gradients.

    >>> Alibi.from_heads(4).slopes.tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """

    slopes: Tensor

    def __post_init__(self) -> None:
        if self.slopes.ndim != 1 or not self.slopes.dtype.is_floating_point:
            raise ScoreError(
                explain_values(
                    "slopes", "must be a 1-D float tensor [H]", shape=tuple(self.slopes.shape), dtype=self.slopes.dtype
                )
            )

    @staticmethod
    def from_heads(num_heads: int, device: torch.device | str | None = None) -> Alibi:
        """The paper's geometric slopes ``2**(-8 (h + 1) / H)``."""
        exponent = torch.arange(1, num_heads + 1, dtype=torch.float32, device=device) * (-8.0 / num_heads)
        return Alibi(torch.exp2(exponent))


@node
class SoftCap(Score):
    """Keep scores in ``(-cap, cap)``: ``cap * tanh(s / cap)`` (Gemma 2, arXiv 2408.00118).

    Args:
        cap: A positive float.
    """

    cap: float

    def __post_init__(self) -> None:
        if not 0 < self.cap < float("inf"):
            raise ScoreError(explain_values("cap", "must be a positive number", cap=self.cap))


@node
class RelativeBias(Score):
    """A bias looked up by clipped distance: ``s + table[h, clip(j - i, -R, R) + R]``.

    Args:
        table: ``[H, 2R + 1]`` floating point, may need gradients.
    """

    table: Tensor

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or self.table.shape[1] % 2 != 1 or not self.table.dtype.is_floating_point:
            raise ScoreError(
                explain_values(
                    "table",
                    "must be float [H, 2R + 1], an odd width",
                    shape=tuple(self.table.shape),
                    dtype=self.table.dtype,
                )
            )

    @property
    def max_distance(self) -> int:
        """R, the distance from which on the bias is constant."""
        return self.table.shape[1] // 2


@node
class Then(Score):
    """`first`, then `second`: ``first >> second``."""

    first: Score
    second: Score

    def __repr__(self) -> str:
        return f"{self.first!r} >> {self.second!r}"


def parts(score: Score | None) -> list[Score]:
    """The chain of scores, in the order they are applied."""
    if score is None:
        return []
    if isinstance(score, Then):
        return parts(score.first) + parts(score.second)
    return [score]


def is_additive(score: Score | None) -> bool:
    """Whether the score only adds something that does not depend on the score itself."""
    return all(isinstance(s, (Alibi, RelativeBias)) for s in parts(score))


def num_score_heads(score: Score | None) -> int | None:
    """How many query heads the score's tables are made for; None if it does not matter.

    Raises:
        ScoreError: If two of them disagree.
    """
    found: set[int] = set()
    for s in parts(score):
        if isinstance(s, Alibi):
            found.add(s.slopes.shape[0])
        elif isinstance(s, RelativeBias):
            found.add(s.table.shape[0])
    if len(found) > 1:
        raise ScoreError(explain_values("score", "every table must have one row per query head", heads=sorted(found)))
    return found.pop() if found else None


def tensors(score: Score | None) -> list[Tensor]:
    """The tensors the built-in nodes hold; what a :class:`ScoreMod` closes over is not among them."""
    held: list[Tensor] = []
    for s in parts(score):
        if isinstance(s, Alibi):
            held.append(s.slopes)
        elif isinstance(s, RelativeBias):
            held.append(s.table)
    return held
