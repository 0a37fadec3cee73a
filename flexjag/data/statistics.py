"""What packing achieved: fill, tokens per step, and how evenly the ranks' work is shared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexjag.data.packing import Budget


@dataclass(frozen=True)
class Statistics:
    """Statistics of packs, R of them in a step.

    Attributes:
        samples: Number of samples.
        tokens: Number of tokens.
        steps: Number of steps.
        fill: Tokens over the tokens there was room for; None without `max_tokens`.
        tokens_per_step: Least, mean and most tokens of a step, all ranks together.
        samples_per_batch: Least, mean and most samples of a batch.
        work_balance: Mean work of a step's ranks over that of its slowest, averaged over the steps by their time: the
            fraction of its time that a rank does not wait for others. 1 with a single rank.
        token_balance: The same of the tokens.
    """

    samples: int
    tokens: int
    steps: int
    fill: float | None
    tokens_per_step: tuple[int, float, int]
    samples_per_batch: tuple[int, float, int]
    work_balance: float
    token_balance: float

    @staticmethod
    def of(samples: np.ndarray, tokens: np.ndarray, work: np.ndarray, budget: Budget) -> Statistics:
        """Statistics of the packs of an epoch.

        Args:
            samples: Samples of each pack, ``[steps, R]``.
            tokens: Tokens of each pack, ``[steps, R]``.
            work: Work of each pack, ``[steps, R]``.
            budget: What a pack may hold.
        """
        room = None if budget.max_tokens is None else tokens.size * budget.max_tokens
        return Statistics(
            samples=int(samples.sum()),
            tokens=int(tokens.sum()),
            steps=len(tokens),
            fill=None if room is None else float(tokens.sum() / room) if room else 0.0,
            tokens_per_step=_range(tokens.sum(1)),
            samples_per_batch=_range(samples.ravel()),
            work_balance=balance(work),
            token_balance=balance(tokens),
        )

    def __str__(self) -> str:
        tokens, samples = (
            f"{low:,} to {high:,}, {mean:,.0f} on average"
            for low, mean, high in (self.tokens_per_step, self.samples_per_batch)
        )
        fill = "no budget of tokens" if self.fill is None else f"{self.fill:.1%} of the budget filled"
        return (
            f"{self.samples:,} samples, {self.tokens:,} tokens in {self.steps:,} steps; {fill}\n"
            f"tokens of a step: {tokens}\n"
            f"samples of a batch: {samples}\n"
            f"balance over ranks: {self.work_balance:.1%} by work, {self.token_balance:.1%} by tokens"
        )


def balance(work: np.ndarray) -> float:
    """Work ``[steps, R]`` done, over the work that all ranks would do if each were the slowest of its step.

    >>> balance(np.array([[4, 4], [1, 3]]))
    0.8571428571428571
    """
    most = work.max(1).sum() * work.shape[1] if work.size else 0
    return float(work.sum() / most) if most else 1.0


def _range(values: np.ndarray) -> tuple[int, float, int]:
    return (int(values.min()), float(values.mean()), int(values.max())) if values.size else (0, 0.0, 0)
