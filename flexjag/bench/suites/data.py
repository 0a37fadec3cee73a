"""Suite ``data``: planning an epoch of batches: time, memory, fill, and how evenly ranks share the work."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from flexjag.bench.measuring.lengths import lognormal_lengths
from flexjag.bench.measuring.measure import Results, describe_error
from flexjag.bench.measuring.peak import measure_peak
from flexjag.bench.suites.registry import ArmResult, CaseResult, Figure, Options, SelfTimedCase, Tell, suite
from flexjag.data import Budget, Statistics, TokenBudgetSampler
from flexjag.data.packing import Packs
from flexjag.data.sampler import squares

LOCATION, SIGMA = 5.5, 1.2  # of the logarithm of a document's length: median 245 tokens, mean 500, long-tailed
RANKS = 8
BUCKET_BATCHES = 100  # about so many batches are sorted by length together, as in common samplers
ROUNDS = 3
OURS, BUCKETS, ORDER = "TokenBudgetSampler", "length buckets, cut in order", "shuffled, cut in order"


@dataclass(frozen=True)
class DataSizes:
    """Number of samples, longest sample, and budget of a batch, in tokens."""

    samples: int
    longest: int
    max_tokens: int


QUICK_SIZES = DataSizes(2_000, 1_024, 1_024)
SIZES = DataSizes(1_000_000, 32_768, 32_768)


class Epoch:
    """The samples of the suite, and the samplers that plan an epoch of them.

    Args:
        sizes: Sizes of the samples and batches.
        seed: Random seed of lengths and samplers.
    """

    def __init__(self, sizes: DataSizes, seed: int) -> None:
        self.sizes, self.seed = sizes, seed
        self.lengths = np.array(lognormal_lengths(sizes.samples, sizes.longest, seed, LOCATION, SIGMA))

    def arms(self) -> dict[str, Callable[[], Statistics]]:
        """Functions that plan an epoch for rank 0 and return the statistics of all ranks, by arm."""
        return {OURS: self._ours, BUCKETS: partial(self._in_order, True), ORDER: partial(self._in_order, False)}

    def _ours(self) -> Statistics:
        made = TokenBudgetSampler(self.lengths, self.sizes.max_tokens, seed=self.seed, num_replicas=RANKS, rank=0)
        return made.statistics()

    def _in_order(self, buckets: bool) -> Statistics:
        """Fill batches with one sample after the other, and deal them to the ranks; the last step may lack some."""
        random, lengths = np.random.default_rng(self.seed), self.lengths
        order = random.permutation(len(lengths))
        if buckets:
            pool = max(1, int(BUCKET_BATCHES * self.sizes.max_tokens / lengths.mean()))
            parts = np.split(order, range(pool, len(order), pool))
            order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
        ends, start = np.cumsum(lengths[order]), 0
        bounds = [0]
        while bounds[-1] < len(order):
            bounds.append(int(np.searchsorted(ends, start + self.sizes.max_tokens, side="right")))
            start = int(ends[bounds[-1] - 1])
        packs = Packs(order, np.array(bounds))
        dealt = random.permutation(len(packs))
        dealt = dealt[: len(dealt) // RANKS * RANKS].reshape(-1, RANKS)
        tokens, work = packs.sums(lengths)[dealt], packs.sums(squares(lengths))[dealt]
        return Statistics.of(np.diff(packs.bounds)[dealt], tokens, work, Budget(self.sizes.max_tokens))

    def wrong(self, name: str, found: Statistics) -> str | None:
        """Description of an error in what an arm planned, or None."""
        if found.samples > len(self.lengths) or found.tokens > int(self.lengths.sum()):
            return "it has samples more than once"
        if name != OURS:
            return None  # leaves out the last step
        ranks = [
            TokenBudgetSampler(self.lengths, self.sizes.max_tokens, seed=self.seed, num_replicas=RANKS, rank=r)
            for r in range(RANKS)
        ]
        batches = [batch for one in ranks for batch in one]
        seen = np.concatenate([np.array(batch) for batch in batches])
        if not np.array_equal(np.sort(seen), np.arange(len(self.lengths))):
            return "not every sample is in one batch"
        if max(int(self.lengths[batch].sum()) for batch in batches) > self.sizes.max_tokens:
            return "a batch exceeds the budget"
        return None


def _measure(sizes: DataSizes, options: Options, tell: Tell) -> list[ArmResult]:
    epoch = Epoch(sizes, options.seed)
    return [_arm(name, plan, epoch, options, tell) for name, plan in epoch.arms().items()]


def _arm(name: str, plan: Callable[[], Statistics], epoch: Epoch, options: Options, tell: Tell) -> ArmResult:
    if options.over:
        return ArmResult(name, "skipped", "the time for this suite was used up before it")
    tell(f"checking {name}")
    try:
        found = plan()
        wrong = epoch.wrong(name, found)
        if wrong is not None:
            return ArmResult(name, "wrong", wrong)
        tell(f"planning by {name}")
        seconds = []
        for _ in range(min(ROUNDS, options.rounds)):
            began = time.perf_counter()
            plan()
            seconds.append(time.perf_counter() - began)
        peak = measure_peak(plan) if options.memory else {"bytes": None, "method": None}
    except Exception as e:  # any exception is the arm's result
        return ArmResult(name, "failed", describe_error(e))
    extra = {"fill": found.fill, "work_balance": found.work_balance, "token_balance": found.token_balance}
    memory, method = peak["bytes"], peak["method"]
    return ArmResult(name, "ok", seconds=seconds, memory_bytes=memory, memory_method=method, extra=extra)


def _name(sizes: DataSizes) -> str:
    return f"{sizes.samples:,} samples, {sizes.max_tokens:,} tokens a batch, {RANKS} ranks"


def _figures(options: Options, cases: list[CaseResult]) -> list[Figure]:
    if options.device != "cpu":
        return []
    found, case = Results(cases), _name(QUICK_SIZES if options.quick else SIZES)
    memory = found.memory(case, OURS)
    limits = (None,) * 3 if options.quick else ("<= 5", "<= 500", ">= 0.98")
    return [
        Figure(f"{case}: planning an epoch", found.seconds(case, OURS), "s", limits[0]),
        Figure(f"{case}: its peak memory", None if memory is None else memory / 1e6, "MB", limits[1]),
        Figure(f"{case}: fill", found.extra(case, OURS, "fill"), "of the budget", limits[2]),
        *(
            Figure(f"{case}: {text} of {name}", found.extra(case, name, key), unit)
            for key, text, unit in (
                ("fill", "fill", "of the budget"),
                ("work_balance", "balance of squared lengths over ranks", "of a step"),
            )
            for name in (OURS, BUCKETS, ORDER)
            if (key, name) != ("fill", OURS)
        ),
    ]


@suite(
    "data",
    "Planning one epoch of batches under a budget of tokens for log-normal lengths: by best-fit-decreasing, and by "
    "filling batches in order. Balance is the mean work of a step's ranks over that of the slowest.",
    _figures,
)
def cases(options: Options) -> list[SelfTimedCase]:
    """One epoch; none for a GPU, which has no part in it."""
    if options.device != "cpu":
        return []
    sizes = QUICK_SIZES if options.quick else SIZES
    facts = {"samples": sizes.samples, "longest": sizes.longest, "budget_tokens": sizes.max_tokens}
    facts |= {"location": LOCATION, "sigma": SIGMA, "ranks": RANKS, "seed": options.seed}
    return [SelfTimedCase(_name(sizes), facts, partial(_measure, sizes, options))]
