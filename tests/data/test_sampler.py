"""TokenBudgetSampler: every sample once per epoch, equal ranks, the same again from a seed and from a state."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from flexjag.data import TokenBudgetSampler
from flexjag.data import sampler as module
from flexjag.errors import DataError

SKEWED = np.clip(np.random.default_rng(1).lognormal(4, 1.2, 3000).astype(np.int64), 1, 2048)


def ranks(count: int, lengths: object = SKEWED, max_tokens: int = 2048, **options: object) -> list[TokenBudgetSampler]:
    return [
        TokenBudgetSampler(lengths, max_tokens, num_replicas=count, rank=r, **options)  # type: ignore[arg-type]
        for r in range(count)
    ]


@given(
    lengths=st.lists(st.integers(0, 12), max_size=50),
    max_tokens=st.integers(12, 40),
    max_samples=st.none() | st.integers(1, 5),
    count=st.integers(1, 4),
    shuffle=st.booleans(),
    pool=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_every_sample_is_in_one_batch_of_one_rank(
    lengths: list[int],
    max_tokens: int,
    max_samples: int | None,
    count: int,
    shuffle: bool,
    pool: int,
    epoch: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "POOL_PACKS", pool)
        samplers = ranks(count, lengths, max_tokens, max_samples=max_samples, shuffle=shuffle)
        for one in samplers:
            one.set_epoch(epoch)
        try:
            batches = [list(one) for one in samplers]
        except DataError:  # only where the samples that are left cannot be shared
            assert len(lengths) % count
            cut = ranks(count, lengths, max_tokens, max_samples=max_samples, shuffle=shuffle, drop_last=True)
            seen = [i for one in cut for batch in one for i in batch]
            assert len(seen) == len(set(seen))
            return
    seen = sorted(i for own in batches for batch in own for i in batch)
    assert seen == list(range(len(lengths)))
    assert len({len(own) for own in batches}) == 1
    assert all(len(one) == len(own) for one, own in zip(samplers, batches, strict=True))
    for batch in (batch for own in batches for batch in own):
        assert batch
        assert sum(lengths[i] for i in batch) <= max_tokens
        assert max_samples is None or len(batch) <= max_samples


def test_seed_and_epoch_decide() -> None:
    first, again, other = (TokenBudgetSampler(SKEWED, 2048, seed=seed) for seed in (3, 3, 4))
    epochs = [list(first), list(first)]
    assert epochs[0] == list(again)
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(other)
    again.set_epoch(1)
    assert list(again) == epochs[1]
    assert again.epoch == 1
    fixed = TokenBudgetSampler(SKEWED, 2048, shuffle=False)
    assert list(fixed) == list(fixed)


def test_pools_meet_other_samples_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).permutation(np.arange(1, 1001))  # all differ: only the pools can vary
    shared = []
    for pool in (16, 1000):
        monkeypatch.setattr(module, "POOL_PACKS", pool)
        sampler = TokenBudgetSampler(lengths, 1000)
        a, b = ({tuple(sorted(batch)) for batch in sampler} for _ in range(2))
        shared.append(len(a & b) / len(a))
    assert shared[0] < 0.25
    assert shared[1] == 1


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_work_evenly(count: int, drop_last: bool) -> None:
    lengths = np.clip(np.random.default_rng(2).lognormal(4, 1.2, 20_000).astype(np.int64), 1, 2048)
    samplers = ranks(count, lengths, drop_last=drop_last)
    per_step = np.array([[(lengths[i] ** 2).sum() for i in one] for one in samplers]).T
    found = samplers[0].statistics()
    assert found.work_balance == pytest.approx(per_step.sum() / (per_step.max(1).sum() * count))
    assert found.work_balance > 0.95
    assert found.fill is not None
    assert found.fill > 0.97
    dealt = per_step.T.ravel()[np.random.default_rng(0).permutation(per_step.size)].reshape(per_step.shape)
    assert count == 1 or found.work_balance > dealt.sum() / (dealt.max(1).sum() * count) + 0.2


def test_work_is_what_the_caller_says() -> None:
    linear = ranks(4, work=lambda n: n * 1.0)[0].statistics()
    assert linear.work_balance == pytest.approx(linear.token_balance)
    with pytest.raises(DataError, match=r"work: must give one value per sample; got work=\(\), samples=3000"):
        TokenBudgetSampler(SKEWED, 2048, work=lambda n: n.sum())


def test_statistics_are_those_of_the_batches() -> None:
    sampler = TokenBudgetSampler(SKEWED, 2048, max_samples=40)
    batches = list(sampler)
    found = sampler.statistics()
    tokens = [int(SKEWED[i].sum()) for i in batches]
    assert (found.samples, found.tokens, found.steps) == (3000, int(SKEWED.sum()), len(batches))
    assert found.fill == pytest.approx(sum(tokens) / (2048 * len(batches)))
    assert found.tokens_per_step == (min(tokens), pytest.approx(np.mean(tokens)), max(tokens))
    assert found.samples_per_batch[2] == max(map(len, batches)) == 40
    assert found.work_balance == found.token_balance == 1.0
    assert "3,000 samples" in str(found)
    assert TokenBudgetSampler([], 8).statistics().steps == 0
    assert TokenBudgetSampler([2, 3], max_squares=16).statistics().fill is None


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(0, 40), st.integers(1, 3), st.booleans())
def test_a_state_goes_on_exactly(lengths: list[int], taken: int, count: int, named: bool) -> None:
    try:
        whole = ranks(count, lengths, 12)
        wanted = [list(one) for one in whole]
    except DataError:
        assume(False)
    taken = min(taken, len(wanted[0]))
    running = ranks(count, lengths, 12)[0]
    batches = iter(running)
    assert [next(batches) for _ in range(taken)] == wanted[0][:taken]
    state = json.loads(json.dumps(running.state_dict(step=taken) if named else running.state_dict()))
    for r, one in enumerate(ranks(count, lengths, 12)):  # the state of one rank is that of all
        one.load_state_dict(state)
        assert len(one) == len(wanted[r])
        assert one.state_dict() == state
        if taken < len(wanted[r]):
            assert list(one) == wanted[r][taken:]
            assert one.epoch == 0
        whole[r].set_epoch(1)
        assert list(one) == list(whole[r])
        assert one.epoch == 1


def test_a_state_at_the_end_of_an_epoch() -> None:
    sampler = TokenBudgetSampler(SKEWED, 2048)
    first = list(sampler)
    state = sampler.state_dict()
    assert (state["epoch"], state["step"]) == (0, len(first))
    second = list(sampler)
    going_on, staying = (TokenBudgetSampler(SKEWED, 2048) for _ in range(2))
    going_on.load_state_dict(state)
    assert list(going_on) == second
    staying.load_state_dict(state)
    staying.set_epoch(0)  # by a loop that counts the epochs itself: nothing is left of this one
    assert list(staying) == []
    staying.set_epoch(1)
    assert list(staying) == second


def test_choosing_the_epoch_of_a_state_keeps_its_position() -> None:
    sampler = TokenBudgetSampler(SKEWED, 2048)
    sampler.set_epoch(2)
    wanted = list(sampler)
    resumed = TokenBudgetSampler(SKEWED, 2048)
    resumed.load_state_dict(sampler.state_dict(step=5))
    resumed.set_epoch(2)
    assert list(resumed) == wanted[5:]
    resumed.set_epoch(2)  # chosen again: from its beginning
    assert list(resumed) == wanted


OTHERS = {
    "lengths": lambda: TokenBudgetSampler(SKEWED[::-1], 2048),
    "budget": lambda: TokenBudgetSampler(SKEWED, 2049),
    "work": lambda: TokenBudgetSampler(SKEWED, 2048, work=lambda n: n),
    "order": lambda: TokenBudgetSampler(SKEWED, 2048, shuffle=False),
    "seed": lambda: TokenBudgetSampler(SKEWED, 2048, seed=1),
    "num_replicas": lambda: ranks(2)[0],
}


@pytest.mark.parametrize("other", OTHERS)
def test_states_of_others_are_refused(other: str) -> None:
    state, sampler = OTHERS[other]().state_dict(), TokenBudgetSampler(SKEWED, 2048)
    name = other if other in ("seed", "num_replicas") else "fingerprint"
    with pytest.raises(DataError, match=rf"state\['{name}'\]: must be"):
        sampler.load_state_dict(state)
    assert sampler.state_dict()["step"] == 0


def test_states_of_another_version_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = TokenBudgetSampler(SKEWED, 2048).state_dict()
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    with pytest.raises(DataError, match="version of the sampler: the batches would be others"):
        TokenBudgetSampler(SKEWED, 2048).load_state_dict(state)


def test_states_that_are_none() -> None:
    sampler = TokenBudgetSampler(SKEWED, 2048)
    with pytest.raises(DataError, match=r"state: must be one that state_dict\(\) returned; got missing=\['epoch'"):
        sampler.load_state_dict({"step": 1})
    with pytest.raises(DataError, match=r"state: must be one that state_dict\(\) returned; got type='NoneType'"):
        sampler.load_state_dict(None)  # type: ignore[arg-type]
    state = sampler.state_dict()
    for name, value in (("step", 100000), ("step", 1.5), ("step", -1), ("step", "a"), ("epoch", 0.5), ("epoch", -1)):
        with pytest.raises(DataError, match=rf"state\['{name}'\]: must be an int of .*{name}'\]={value!r}"):
            sampler.load_state_dict({**state, name: value})
    assert sampler.state_dict() == TokenBudgetSampler(SKEWED, 2048).state_dict()


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: TokenBudgetSampler(SKEWED, 2048, seed=-1), "seed: must be an int of at least 0; got seed=-1"),
        (lambda: TokenBudgetSampler(SKEWED, 2048, seed="a"), "seed: must be an int of at least 0; got seed='a'"),
        (lambda: TokenBudgetSampler(SKEWED, 2048).set_epoch(-1), "epoch: must be an int of at least 0; got epoch=-1"),
        (lambda: TokenBudgetSampler(SKEWED, 2048).state_dict(step=10**6), "step: must be an int of 0 to .*=1000000"),
        (lambda: TokenBudgetSampler(SKEWED, 2048, work=3), "work: must be a function of the lengths; got work=3"),
        (lambda: TokenBudgetSampler(SKEWED, 2048, work=lambda n: -n), "work: must give finite numbers of at least 0"),
        (lambda: TokenBudgetSampler(SKEWED, 2048, work=lambda n: n * np.nan), "work: must give finite numbers"),
    ],
)
def test_arguments_that_make_no_sense(made: Callable[[], object], says: str) -> None:
    with pytest.raises(DataError, match=says):
        made()


def test_what_cannot_be_shared_is_an_error_or_left_out() -> None:
    with pytest.raises(DataError, match=r"drop_last=True leaves the last ones out; got batches=3, ranks=2, samples=3"):
        list(ranks(2, [8, 8, 7], 8)[0])
    left = [list(one) for one in ranks(2, [8, 8, 7], 8, drop_last=True)]
    assert sorted(i for own in left for batch in own for i in batch) == [0, 1]
    assert [list(one) for one in ranks(4, [1, 1, 1, 1], 8, shuffle=False)] == [[[0]], [[1]], [[2]], [[3]]]


def test_ranks_are_those_of_the_process_group(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    assert (ranks(1)[0].num_replicas, TokenBudgetSampler([1], 2).rank) == (1, 0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    sampler = TokenBudgetSampler(torch.tensor([1, 2, 3]), 4)
    assert (sampler.num_replicas, sampler.rank) == (3, 2)
    with pytest.raises(DataError, match=r"rank: must be from 0 to num_replicas - 1; got rank=2, num_replicas=2"):
        TokenBudgetSampler([1], 2, num_replicas=2, rank=2)


def test_long_samples_are_refused_or_counted_as_cut() -> None:
    with pytest.raises(DataError, match=r"lengths\[1\]=20, longest=16"):
        TokenBudgetSampler([3, 20], 16)
    sampler = TokenBudgetSampler([3, 20], 16, truncate=True)
    assert sampler.longest == 16
    assert sampler.statistics().tokens == 19
