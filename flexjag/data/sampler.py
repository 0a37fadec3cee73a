"""A batch sampler with a budget of tokens: packs, shares among ranks, resumes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from flexjag.data.packing import Budget, Packs, best_fit_decreasing, check_lengths, fit
from flexjag.data.statistics import Statistics
from flexjag.errors import DataError, explain_values
from flexjag.offsets import as_int

POOL_PACKS = 512
"""About how many packs are filled from the same random samples. More fill better, fewer meet differently each epoch."""

VERSION = 1
"""Of the plan that a seed and an epoch give. To be raised with any change of it, so that old states are refused."""

Work = Callable[[np.ndarray], np.ndarray]


def squares(lengths: np.ndarray) -> np.ndarray:
    """The work of attention without a window: the square of each length."""
    return lengths * lengths


@dataclass(frozen=True)
class _Epoch:
    """The batches of one rank in one epoch, and statistics of all ranks."""

    number: int
    batches: Packs
    statistics: Statistics


class TokenBudgetSampler(Sampler[list[int]]):
    """Batches of samples whose tokens fit a budget, for ``DataLoader(batch_sampler=...)``.

    Samples are packed best-fit-decreasing, in pools of some hundred batches that are drawn anew for each epoch. Each is
    in exactly one batch of one rank. All ranks have the same number of batches, and those of a step have about the same
    work: batches are ranked by it, and neighbours make a step. All of it follows from lengths, seed and epoch.

    Every iteration is the next epoch, unless :meth:`set_epoch` or :meth:`load_state_dict` says otherwise.

    Args:
        lengths: Tokens of each sample, ``[N]`` integers.
        max_tokens: The most tokens of a batch.
        max_squares: The most squared lengths of a batch, summed: attention without a window takes time for them.
        max_samples: The most samples of a batch.
        shuffle: Draw pools and the order of the steps anew for each epoch. If False, the same order in every epoch.
        seed: Seed of the random numbers; the same on all ranks.
        num_replicas: Number of ranks R. Default: that of `torch.distributed`, 1 where it is not in use.
        rank: This process's rank. Default: that of `torch.distributed`.
        work: Work of samples, ``[N] -> [N]`` from their lengths, in any unit. Default: the squares of the lengths.
        truncate: Count samples that no batch takes as the longest it takes, :attr:`longest`, to which :func:`collate`
            or :class:`PackedDataset` cuts them. By default they are an error.
        drop_last: Leave out the last, lightest batches if their number is no multiple of R. By default batches
            are split so that it is one, and if there are too few samples for that, it is an error.

    Raises:
        DataError: If lengths, budgets or ranks make no sense, a sample is longer than the budget allows, or, when an
            epoch is planned, its batches cannot be shared.

    >>> sampler = TokenBudgetSampler([5, 3, 8, 2, 7], max_tokens=10, shuffle=False)
    >>> list(sampler)
    [[0], [2, 3], [4, 1]]
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray | Tensor,
        max_tokens: int | None = None,
        *,
        max_squares: int | None = None,
        max_samples: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        work: Work = squares,
        truncate: bool = False,
        drop_last: bool = False,
    ) -> None:
        self.budget = Budget(max_tokens, max_squares, max_samples)
        self.lengths = fit(check_lengths(lengths), self.budget, truncate)
        self.shuffle, self.seed, self.drop_last = shuffle, _whole("seed", seed), drop_last
        self.num_replicas, self.rank = _ranks(num_replicas, rank)
        if not callable(work):
            raise DataError(explain_values("work", "must be a function of the lengths", work=work))
        self.work = np.asarray(work(self.lengths))
        if self.work.shape != self.lengths.shape:
            seen = {"work": self.work.shape, "samples": len(self.lengths)}
            raise DataError(explain_values("work", "must give one value per sample", **seen))
        if self.work.dtype.kind not in "biuf" or not (np.isfinite(self.work) & (self.work >= 0)).all():
            seen = {"dtype": str(self.work.dtype), "work": self.work}
            raise DataError(explain_values("work", "must give finite numbers of at least 0", **seen))
        self._epoch, self._step = 0, 0
        self._start: int | None = 0  # where the next iteration begins; None: with the next epoch
        self._chosen = False  # whether set_epoch chose the epoch
        self._planned: _Epoch | None = None

    @property
    def longest(self) -> int:
        """The longest sample that a batch takes, in tokens; for ``collate(max_length=...)`` with ``truncate=True``."""
        return self.budget.longest

    @property
    def epoch(self) -> int:
        """The epoch of the latest or, before it, the coming iteration, from 0."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration. One that a loaded state is in goes on where that was taken."""
        epoch = _whole("epoch", epoch)
        if epoch != self._epoch or self._start is None:
            self._epoch, self._step, self._start = epoch, 0, 0
        self._chosen = True

    def __len__(self) -> int:
        """Number of batches of this rank in the epoch, those before a resumed position included."""
        return len(self._plan().batches)

    def __iter__(self) -> Iterator[list[int]]:
        if self._start is None or (not self._chosen and 0 < len(self) <= self._start):
            self._epoch, self._start = self._epoch + 1, 0
        start, self._start, self._chosen = self._start, None, False
        batches, self._step = self._plan().batches, start
        for at in range(start, len(batches)):
            self._step = at + 1
            yield batches[at].tolist()

    def statistics(self) -> Statistics:
        """Statistics of the epoch over all ranks."""
        return self._plan().statistics

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """The position in the epoch, the same on all ranks: plain numbers and text.

        Args:
            step: Number of batches of the epoch that training is done with. Default: those that were given out, which
                is more than that where a DataLoader with workers fetches ahead (torchdata's StatefulDataLoader keeps
                count itself).

        Raises:
            DataError: If `step` is not from 0 to the number of batches.
        """
        at = self._step if self._start is None else self._start
        if step is not None:
            at = _whole("step", step, len(self))
        state = {"epoch": self._epoch, "step": at}
        return {**state, "num_replicas": self.num_replicas, "seed": self.seed, "fingerprint": self.fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken: the next iteration gives the batches that are left of its epoch.

        Raises:
            DataError: If the state is of other samples, settings, ranks, or another version of this sampler.
        """
        if not isinstance(state, Mapping):
            rule = "must be one that state_dict() returned"
            raise DataError(explain_values("state", rule, type=type(state).__name__))
        missing = [x for x in ("epoch", "step", "num_replicas", "seed", "fingerprint") if x not in state]
        if missing:
            raise DataError(explain_values("state", "must be one that state_dict() returned", missing=missing))
        for name, mine in (("num_replicas", self.num_replicas), ("seed", self.seed)):
            if state[name] != mine:
                raise DataError(explain_values(f"state[{name!r}]", f"must be {mine}, as here", **{name: state[name]}))
        if state["fingerprint"] != self.fingerprint():
            rule = "must be of the same lengths, budgets, work and version of the sampler: the batches would be others"
            seen = {"state": state["fingerprint"], "here": self.fingerprint()}
            raise DataError(explain_values("state['fingerprint']", rule, **seen))
        before, self._epoch = self._epoch, _whole("state['epoch']", state["epoch"])
        try:
            step = _whole("state['step']", state["step"], len(self))
        except DataError:
            self._epoch = before
            raise
        self._step = self._start = step
        self._chosen = False

    def fingerprint(self) -> str:
        """A hash of all that batches follow from, but seed, epoch and rank: lengths, work, settings and version."""
        if not hasattr(self, "_fingerprint"):
            found = hashlib.blake2b(digest_size=16)
            settings = (VERSION, POOL_PACKS, self.budget, self.shuffle, self.num_replicas, self.drop_last)
            found.update(repr((settings, len(self.lengths), str(self.work.dtype))).encode())
            for values in (self.lengths, self.work):
                found.update(np.ascontiguousarray(values).data)
            self._fingerprint = found.hexdigest()
        return self._fingerprint

    def _plan(self) -> _Epoch:
        if self._planned is None or self._planned.number != self._epoch:
            self._planned = None  # its memory is free before the next one's is taken
            self._planned = self._plan_epoch(self._epoch)
        return self._planned

    def _plan_epoch(self, epoch: int) -> _Epoch:
        random = np.random.default_rng((self.seed, epoch))
        packs = self._packs(random)
        ranks = self.num_replicas
        if not self.drop_last:
            packs = _split(packs, self.work, ranks)
        work = packs.sums(self.work)
        steps = len(packs) // ranks
        if steps * ranks != len(packs) and not self.drop_last:
            rule = "must make as many batches for every rank; drop_last=True leaves the last ones out"
            raise DataError(explain_values("lengths", rule, batches=len(packs), ranks=ranks, samples=len(self.lengths)))
        by_step = np.argsort(-work, kind="stable")[: steps * ranks].reshape(steps, ranks)
        if self.shuffle:
            by_step = random.permuted(by_step[random.permutation(steps)], axis=1)
        elif steps:
            by_step = by_step[np.argsort(packs.order[packs.bounds[by_step]].min(1), kind="stable")]
        tokens, samples = packs.sums(self.lengths), np.diff(packs.bounds)
        statistics = Statistics.of(samples[by_step], tokens[by_step], work[by_step], self.budget)
        return _Epoch(epoch, packs.take(by_step[:, self.rank]), statistics)

    def _packs(self, random: np.random.Generator) -> Packs:
        """Packs of all samples, pool by pool."""
        count = len(self.lengths)
        order = random.permutation(count) if self.shuffle else np.arange(count)
        costs = np.maximum(self.lengths, 1)
        least = [int(costs.sum() // self.budget.max_tokens)] if self.budget.max_tokens else []
        least += [int((costs * costs).sum() // self.budget.max_squares)] if self.budget.max_squares else []
        orders, bounds, done = [np.zeros(0, np.int64)], [np.zeros(1, np.int64)], 0
        for pool in np.array_split(order, max(1, max(least) // POOL_PACKS)):
            packs = best_fit_decreasing(self.lengths[pool], self.budget)
            orders.append(pool[packs.order])
            bounds.append(packs.bounds[1:] + done)
            done += len(pool)
        return Packs(np.concatenate(orders), np.concatenate(bounds))


def _whole(name: str, given: object, most: int | None = None) -> int:
    """A whole number of at least 0, and at most `most`, as an int.

    Raises:
        DataError: If it is none.
    """
    found = as_int(given)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0 or (most is not None and found > most):
        rule = f"must be an int of {'at least 0' if most is None else f'0 to {most}, the batches of the epoch'}"
        raise DataError(explain_values(name, rule, **{name: given}))
    return found


def _ranks(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    running = dist.is_available() and dist.is_initialized()
    replicas = as_int(num_replicas if num_replicas is not None else dist.get_world_size() if running else 1)
    own = as_int(rank if rank is not None else dist.get_rank() if running else 0)
    if not (isinstance(replicas, int) and isinstance(own, int) and 0 <= own < replicas):
        raise DataError(explain_values("rank", "must be from 0 to num_replicas - 1", rank=own, num_replicas=replicas))
    return replicas, own


def _split(packs: Packs, work: np.ndarray, ranks: int) -> Packs:
    """Halve the heaviest packs of several samples by work, until their number is a multiple of the ranks."""
    while missing := -len(packs) % ranks:
        heavy = np.argsort(-packs.sums(work), kind="stable")
        heavy = heavy[np.diff(packs.bounds)[heavy] > 1][:missing]
        if not heavy.size:
            break
        cuts = []
        for b in heavy:
            low, high = packs.bounds[b], packs.bounds[b + 1]
            half = np.cumsum(work[packs.order[low:high]])
            cuts.append(low + 1 + min(int(np.searchsorted(half, half[-1] / 2)), high - low - 2))
        packs = Packs(packs.order, np.sort(np.concatenate([packs.bounds, np.array(cuts, np.int64)])))
    return packs
