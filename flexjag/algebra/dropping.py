"""The score node of dropout: it rules out a share of the (query, key) pairs, drawn by a hash of where they are."""

from __future__ import annotations

from torch import Tensor

from flexjag.algebra.node import along, node
from flexjag.algebra.scores import Score

STEP = 0x61C88647
"""Distance of consecutive words and keys before mixing: 2**32 divided by the golden ratio, negated."""

FACTORS = (0x21F0AAAD, 0x735A2D97)
"""Factors of the mixing of 32 bits (TheIronborn's, found by Wellons' hash-prospector)."""


@node
class Dropped(Score):
    """-inf for the pairs whose hash, as a signed number of 32 bits, is less than `below`; other scores stay.

    All arithmetic is on 32 bits and wraps around, and shifts to the right fill with zeros. ``mix(x)`` is
    ``x ^= x >> 16``, ``x *= FACTORS[0]``, ``x ^= x >> 15``, ``x *= FACTORS[1]``, ``x ^= x >> 15``. A row starts with 0
    and takes a word w by ``x = mix((x ^ w) + STEP)``: of the seed, of the segment's number (of each the low half, then
    the high one), of the query head, and of the query's position. The hash of its key at position j is
    ``mix(x + j * STEP)``.

    Args:
        seed: int64, 0-d.
        below: int32, 0-d: ``p * 2**32 - 2**31`` drops a share p.
        heads: H.
        ids: ``[S]`` integers, the number of each segment; None for its index.
    """

    additive = printable = True
    reads_pairs = False

    seed: Tensor = along(None)
    below: Tensor = along(None)
    heads: int
    ids: Tensor | None = along("segment", default=None)
