"""merge(): attention over disjoint key sets as attention over their union."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexjag.errors import ShapeError, explain_values
from flexjag.jagged import Jagged
from flexjag.offsets import check_same_layout


def merge(parts: Sequence[tuple[Jagged, Jagged]]) -> tuple[Jagged, Jagged]:
    """Combine attention over disjoint key sets into attention over their union, exactly.

    Args:
        parts: Pairs ``(out, lse)`` from :func:`attention` with ``return_lse=True``: values ``[T, H, E]`` and
            ``[T, H]``, the same queries each time.

    Returns:
        The merged ``(out, lse)``. Rows that no part has a key for stay 0 and -inf. Differentiable.

    Raises:
        ShapeError: If there is no part or the parts' shapes differ.

    >>> from flexjag.algebra.masks import Causal
    >>> from flexjag.api.attention import attention
    >>> x = Jagged.from_lengths(torch.randn(6, 1, 16), [2, 4])
    >>> a = attention(x, x, x, mask=Causal(), return_lse=True)
    >>> b = attention(x, x, x, mask=~Causal(), return_lse=True)
    >>> whole = attention(x, x, x)
    >>> torch.allclose(merge([a, b])[0].values, whole.values, atol=1e-6)
    True
    """
    if not parts:
        raise ShapeError(explain_values("parts", "must hold at least one (out, lse)", parts=parts))
    for part in parts:
        if not isinstance(part, tuple | list) or len(part) != 2:
            rule = "must be pairs (out, lse), which attention gives with return_lse=True"
            raise ShapeError(explain_values("parts", rule, type=type(part).__name__))
    first = parts[0][0]
    for out, lse in parts:
        for part in (out, lse):
            check_same_layout(first, part, "parts", "must all have the same offsets")
        if out.values.shape != first.values.shape or lse.values.shape != first.values.shape[:2]:
            raise ShapeError(
                explain_values(
                    "parts",
                    "every out must be [T, H, E] and every lse [T, H]",
                    out=tuple(out.values.shape),
                    lse=tuple(lse.values.shape),
                    first_out=tuple(first.values.shape),
                )
            )
    lses = torch.stack([lse.values for _, lse in parts])
    top = lses.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    outs = torch.stack([out.values for out, _ in parts]).to(weights.dtype)
    merged = (weights[..., None] * outs).sum(0) / total[..., None]
    lse = (top + total.log()).masked_fill(empty, -torch.inf)
    return first.with_values(merged.to(first.values.dtype)), first.with_values(lse)
