"""Suite ``decode``: steps of one token for each of several sequences, whose keys and values are cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from flexjag.bench.arms.decode import (
    CONCATENATED,
    LISTED,
    LISTED_PREALLOCATED,
    OURS,
    PREALLOCATED,
    DecodeBatch,
    DecodeSizes,
)
from flexjag.bench.measuring.lengths import lognormal_lengths
from flexjag.bench.measuring.measure import Results, ratio
from flexjag.bench.suites.registry import Arm, Case, CaseResult, Figure, Options, suite

GROUPED, FULL, ONE = "8 heads share 2", "8 heads", "one sequence, 8 heads share 2"
OTHERS = (CONCATENATED, PREALLOCATED, LISTED, LISTED_PREALLOCATED)
LIMITS = {GROUPED: ">= 1.5", FULL: ">= 3"}
"""Limits of the time of padded caches that grow by torch.cat, as those of most libraries do."""


def _sizes(name: str, options: Options) -> DecodeSizes:
    few = options.quick
    segments, longest = (1 if name == ONE else 4, 64) if few else (1 if name == ONE else 32, 2048)
    lengths = [longest] if name == ONE else lognormal_lengths(segments, longest, options.seed, 4.0 if few else 5.5)
    dim = 16 if few else 64
    return DecodeSizes(lengths, 3 if few else 16, 2, 8, 8 if name == FULL else 2, dim)


def _arms(sizes: DecodeSizes, options: Options) -> Sequence[Arm]:
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    return DecodeBatch(sizes, dtype, options.device, options.seed).arms()


def _figures(options: Options, cases: list[CaseResult]) -> list[Figure]:
    found = Results(cases)
    figures = []
    for name in (GROUPED, FULL, ONE):
        for other in OTHERS:
            promised = options.device == "cpu" and not options.quick and other == CONCATENATED
            value = ratio(found.seconds(name, other), found.seconds(name, OURS))
            figures.append(
                Figure(f"{name}: time of {other} / {OURS}", value, "x", LIMITS.get(name) if promised else None)
            )
        for other in OTHERS:
            value = ratio(found.memory(name, OURS), found.memory(name, other))
            figures.append(Figure(f"{name}: memory of {OURS} / {other}", value, "x"))
    return figures


@suite(
    "decode",
    "Steps of one token for each of several sequences behind prompts of log-normal lengths, in two layers; times are "
    "those of a step, with planning and the cache's bookkeeping. Memory is that of the caches and the steps.",
    _figures,
)
def cases(options: Options) -> list[Case]:
    """Grouped queries, as many key heads as query heads, and a single long sequence."""
    made = []
    for name in (GROUPED, FULL, ONE):
        sizes = _sizes(name, options)
        small = replace(sizes, lengths=[min(n, 128) for n in sizes.lengths], steps=1)  # by the same kernels
        facts = {"segments": len(sizes.lengths), "tokens": sum(sizes.lengths), "longest": max(sizes.lengths)}
        facts |= {"steps": sizes.steps, "layers": sizes.layers, "heads": sizes.heads, "groups": sizes.groups}
        facts |= {"dim": sizes.dim, "dtype": "bfloat16" if options.device == "cuda" else "float32"}
        facts |= {"seed": options.seed}
        made.append(Case(name, facts, partial(_arms, sizes, options), partial(_arms, small, options), compiles=False))
    return made
