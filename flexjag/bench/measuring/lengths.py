"""Seeded distributions of segment lengths, as in batches of recommenders and of language models."""

from __future__ import annotations

import math

import torch


def meta_lengths(segments: int, longest: int, sparsity: float, seed: int) -> list[int]:
    """Lengths by Meta's generator, with which the kernels for jagged attention and HSTU were measured.

    Args:
        segments: Number of segments S.
        longest: Upper bound N of the lengths, exclusive.
        sparsity: The parameter s, about the mean length over N: lengths are uniform in [0, 2sN) if s < 0.5, and in
            [(2s - 1)N, N) otherwise.
        seed: Random seed.

    >>> meta_lengths(4, 100, 0.95, seed=0)
    [94, 99, 93, 90]
    """
    low, high = (0, 2 * sparsity * longest) if sparsity < 0.5 else ((2 * sparsity - 1) * longest, longest)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(round(low), max(round(high), 1), (segments,), generator=generator).tolist()


def lognormal_lengths(segments: int, longest: int, seed: int, location: float = 5.0, sigma: float = 0.9) -> list[int]:
    """Log-normal lengths with median e^location, clamped to 1 … `longest`."""
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


def uniform_lengths(segments: int, longest: int, seed: int) -> list[int]:
    """Lengths uniform in 1 … `longest`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, longest + 1, (segments,), generator=generator).tolist()


def constant_lengths(segments: int, length: int) -> list[int]:
    """Equal lengths: there is no padding, so packing has the least to gain."""
    return [length] * segments
