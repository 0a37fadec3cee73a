"""Distributions of segment lengths, seeded: what batches of a recommender and of a language model look like."""

from __future__ import annotations

import math

import torch


def meta_lengths(segments: int, longest: int, sparsity: float, seed: int) -> list[int]:
    """Meta's generator, with which the kernels for jagged attention and HSTU were measured.

    Args:
        segments: S.
        longest: N, over every length.
        sparsity: s, about the mean length's share of N: lengths are uniform from 0 to 2sN if s < 0.5, and from
            (2s - 1)N to N otherwise, the upper end left out.
        seed: What they are drawn from.

    >>> meta_lengths(4, 100, 0.95, seed=0)
    [94, 99, 93, 90]
    """
    low, high = (0, 2 * sparsity * longest) if sparsity < 0.5 else ((2 * sparsity - 1) * longest, longest)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(round(low), max(round(high), 1), (segments,), generator=generator).tolist()


def lognormal_lengths(segments: int, longest: int, seed: int, location: float = 5.0, sigma: float = 0.9) -> list[int]:
    """Log-normal lengths from 1 to `longest`; the median is e^location."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.empty(segments).log_normal_(location, sigma, generator=generator)
    return draws.long().clamp(1, longest).tolist()


def document_lengths(tokens: int, seed: int, mean: float = 400.0, sigma: float = 1.0) -> list[int]:
    """Long-tailed lengths of documents packed into `tokens` tokens: log-normal, at least 1, the last one cut to fit."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.empty(max(16, 4 * tokens // int(mean)))
    lengths = draws.log_normal_(math.log(mean) - sigma**2 / 2, sigma, generator=generator).long().clamp(min=1)
    ends = lengths.cumsum(0)
    count = int((ends < tokens).sum()) + 1
    return [*lengths[: count - 1].tolist(), tokens - int(ends[count - 1] - lengths[count - 1])]


def constant_lengths(segments: int, length: int) -> list[int]:
    """All the same: nothing to pad, so the least that there is to gain."""
    return [length] * segments
