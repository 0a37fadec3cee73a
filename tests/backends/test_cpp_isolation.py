"""Segments, threads and repeated calls of the backend ``cpp``: what must be the same to the bit, and is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import needing_gradients
from cpp_cases import F32, STRUCTURES, Shape, batches
from torch import Tensor

import flexjag as fj
from flexjag.kernels.cpp import build
from flexjag.testing import assert_matches_reference, assert_no_leak

pytestmark = pytest.mark.skipif(build.refusal() is not None, reason=str(build.refusal()))
LENGTHS = (3, 49, 0, 300, 97, 1, 700, 24)
"""Two of the segments are long enough to be cut among threads."""
NAMES = pytest.mark.parametrize("name", ["float32", "scores", "bfloat16", "silu"])
THREADS = pytest.mark.parametrize("threads", [1, 2, 3])


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


BAND = fj.MaskMod(lambda b, h, i, j: (i - j).abs() < 30)
"""A predicate that leaves few keys to each query, of which the first are elsewhere for each."""


def run(
    name: str,
    lengths: tuple[int, ...],
    inputs: tuple[fj.Jagged, ...],
    learned: bool = False,
    mask: fj.Mask = fj.Causal(),  # noqa: B008
) -> list[Tensor]:
    """Output and gradients of a structure."""
    structure, shape = STRUCTURES[name], Shape(lengths, lengths, 4, 2)
    q, k, v = needing_gradients(*inputs)
    k, v = q.with_values(k.values), q.with_values(v.values)
    parts = {"score": structure.score(shape), "normalizer": structure.normalizer(shape)}
    plan = fj.plan(q, mask=mask, block_size=16, **parts)
    out = fj.attention(q, k, v, plan=plan, backend="cpp").values
    leaves = [x.values for x in (q, k, v)]
    if learned:
        tables = fj.algebra.user_functions.learned_tensors(plan.score, F32, plan.place)
        leaves += [x for x in tables if x.is_leaf]
    weights = torch.cat([torch.linspace(-1, 1, n, dtype=out.dtype) for n in lengths])[:, None, None]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def values(name: str, lengths: tuple[int, ...] = LENGTHS) -> tuple[fj.Jagged, ...]:
    structure = STRUCTURES[name]
    return batches(Shape(lengths, lengths, 4, 2), structure.dtype, structure.dim, structure.value_dim)


def rows_of(segment: int) -> slice:
    return slice(sum(LENGTHS[:segment]), sum(LENGTHS[: segment + 1]))


@THREADS
@pytest.mark.parametrize(
    ("name", "mask"), [("float32", fj.Causal()), ("bfloat16", fj.Causal()), ("float32", BAND)], ids=str
)
def test_a_segment_alone_gives_the_bits_that_it_gives_among_others(name: str, mask: fj.Mask, threads: int) -> None:
    torch.set_num_threads(threads)
    inputs = values(name)
    together = run(name, LENGTHS, inputs, mask=mask)
    for segment, length in enumerate(LENGTHS):
        rows = rows_of(segment)
        alone = tuple(fj.Jagged.from_lengths(x.values[rows], [length]) for x in inputs)
        for got, wanted in zip(run(name, (length,), alone, mask=mask), together, strict=True):
            assert torch.equal(got, wanted[rows])


@THREADS
@NAMES
@pytest.mark.parametrize("value", [7.5, torch.nan, torch.inf, -torch.inf])
def test_other_segments_do_not_change_by_a_bit(name: str, value: float, threads: int) -> None:
    """Whatever q, k and v of one segment hold: outputs and gradients of the others are the same."""
    torch.set_num_threads(threads)
    inputs, rows = values(name), rows_of(4)
    before = run(name, LENGTHS, inputs)
    changed = []
    for x in inputs:
        y = x.values.clone()
        y[rows] = value
        changed.append(x.with_values(y))
    after = run(name, LENGTHS, tuple(changed))
    for got, wanted in zip(after, before, strict=True):
        assert not torch.equal(got[rows], wanted[rows])
        got[rows] = wanted[rows]
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["float32", "opaque"])
def test_no_segment_leaks(name: str) -> None:
    structure, shape = STRUCTURES[name], Shape((17, 0, 50, 3), (9, 4, 97, 0), 4, 2)
    q, k, v = batches(shape, structure.dtype, structure.dim, structure.value_dim)
    assert_no_leak("cpp", q, k, v, mask=structure.mask(structure.masks[0], shape))


@THREADS
@NAMES
def test_two_calls_give_the_same_bits(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    for got, wanted in zip(*(run(name, LENGTHS, values(name), learned=True) for _ in range(2)), strict=True):
        assert torch.equal(got, wanted)


@NAMES
def test_threads_differ_by_rounding_only(name: str) -> None:
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(name, LENGTHS, values(name), learned=True))
    eps = torch.finfo(STRUCTURES[name].dtype).eps
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])  # a block's output is one thread's work
        for got, wanted in zip(other[1:], found[0][1:], strict=True):
            # sums of at most 700 terms in parts, in another order
            torch.testing.assert_close(got, wanted, rtol=32 * eps, atol=32 * eps * float(wanted.abs().max()))


def test_many_short_segments_race_for_threads() -> None:
    lengths = (5, 1, 0, 9, 2) * 60
    inputs = values("scores", lengths)
    torch.set_num_threads(2)
    wanted = run("scores", lengths, inputs, learned=True)
    for _ in range(50):
        for got, first in zip(run("scores", lengths, inputs, learned=True), wanted, strict=True):
            assert torch.equal(got, first)


@THREADS
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
def test_few_queries_with_many_keys(name: str, threads: int) -> None:
    """Decode steps, which are cut along the keys: right, the same each time, and each as if it were alone."""
    torch.set_num_threads(threads)
    structure, q_lengths, kv_lengths = STRUCTURES[name], (1, 3, 0, 1, 40, 2), (9000, 4096, 5000, 4095, 6200, 0)
    q, k, v = batches(Shape(q_lengths, kv_lengths, 4, 2), structure.dtype, structure.dim, structure.value_dim)
    mask = fj.PerHead([fj.Full(), fj.Window(5000, 3), fj.Causal("end"), fj.Prefix(7) | ~fj.Prefix(5000)])
    assert_matches_reference(q, k, v, mask=mask, backend="cpp")
    found = [fj.attention(q, k, v, mask=mask, backend="cpp", return_lse=True) for _ in range(2)]
    for once, again in zip(*found, strict=True):
        assert torch.equal(once.values, again.values)
    for one in range(len(q_lengths)):
        alone = [fj.Jagged.from_list([x.to_list()[one]]) for x in (q, k, v)]
        for got, together in zip(
            fj.attention(*alone, mask=mask, backend="cpp", return_lse=True), found[0], strict=True
        ):
            assert torch.equal(got.values, together.to_list()[one])
