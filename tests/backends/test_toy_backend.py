"""A backend that one user file adds: named it runs, is checked and is explained; `auto` asks it only where it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import make_qkv
from hypothesis import given
from hypothesis import strategies as st
from test_attention import LENGTHS, MASKS, SCORES
from toys.dense_backend import MOST, TOY

import flexjag as fj
from flexjag.backends import Backend, register, unregister
from flexjag.errors import BackendError, PlanError
from flexjag.testing import assert_matches_reference, assert_no_leak, problems


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    register(TOY)
    yield
    unregister("toy")


@pytest.fixture
def add() -> Iterator[Callable[[Backend], None]]:
    added: list[str] = []

    def one(backend: Backend) -> None:
        register(backend)
        added.append(backend.name)

    yield one
    for name in added:
        unregister(name)


def test_it_takes_forty_lines() -> None:
    assert len((Path(__file__).parents[1] / "toys" / "dense_backend.py").read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@given(data=st.data())
def test_it_is_the_reference(data: st.DataObject, dtype: torch.dtype) -> None:
    p = data.draw(problems(dtype=dtype))
    assert_matches_reference(p.q, p.k, p.v, plan=p.plan(), backend="toy", learned=p.learned)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masks(mask: fj.Mask) -> None:
    assert_matches_reference(*make_qkv(LENGTHS), mask=mask, backend="toy")


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES.keys())
def test_scores(score: fj.Score | None) -> None:
    assert_matches_reference(*make_qkv(LENGTHS), mask=fj.Causal(), score=score, backend="toy")


@pytest.mark.parametrize(("groups", "dim", "value_dim"), [(1, 16, 16), (2, 16, 24), (4, 8, 3), (4, 1, 1)])
@pytest.mark.parametrize("kv_lengths", [None, [50, 20, 3, 1], [3, 0, 5, 40]], ids=str)
def test_shapes_and_cross_attention(groups: int, dim: int, value_dim: int, kv_lengths: list[int] | None) -> None:
    q, k, v = make_qkv(LENGTHS, kv_lengths, heads=4, groups=groups, dim=dim, value_dim=value_dim)
    assert_matches_reference(q, k, v, mask=fj.Causal("end"), backend="toy")


def test_edges() -> None:
    for lengths in ([], [0], [0, 0, 3], [1], [17, 0]):
        q, k, v = make_qkv(lengths, dtype=torch.float32)
        got = fj.attention(q, k, v, mask=fj.Causal(), backend="toy").values
        torch.testing.assert_close(got, fj.attention(q, k, v, mask=fj.Causal(), backend="reference").values)
    q, k, v = make_qkv([30, 17], dtype=torch.float32)
    x = fj.Jagged(torch.cat([q.values, torch.full((17, 2, q.values.shape[2]), torch.nan)]), q.offsets)
    spare = fj.attention(x, x, x, plan=fj.plan(x, max_tokens=64, max_length=30), backend="toy").values
    assert not spare[47:].any()
    assert_no_leak("toy", q, k, v, mask=fj.Causal())


def test_it_runs_in_a_graph() -> None:
    q, k, v = make_qkv([30, 17], dtype=torch.float32)

    @torch.compile(fullgraph=True, backend="eager")
    def attend(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged) -> torch.Tensor:
        return fj.attention(q, k, v, mask=fj.Causal(), backend="toy").values

    assert torch.equal(attend(q, k, v), fj.attention(q, k, v, mask=fj.Causal(), backend="toy").values)


def test_the_rule_and_the_promises_refuse() -> None:
    q, k, v = make_qkv([5000], heads=1, dim=1, dtype=torch.float32)
    with pytest.raises(BackendError, match=f"'toy' cannot run this plan: it holds at most {MOST} scores"):
        fj.attention(q, k, v, backend="toy")
    q, k, v = make_qkv([5])
    with pytest.raises(BackendError, match="its kernels compute a softmax, not SiLU"):
        fj.attention(q, k, v, normalizer=fj.SiLU(), backend="toy")


def test_auto_asks_it_only_where_it_says(add: Callable[[Backend], None]) -> None:
    plan = fj.plan(make_qkv([30])[0], mask=fj.Causal())
    assert plan.backend == "segments"
    assert "toy" in plan.explain()
    capped = fj.plan(make_qkv([30])[0], score=fj.SoftCap(3.0))
    add(replace(TOY, name="last", before="tiled"))
    assert (plan.backend, capped.backend) == ("segments", "last")
    add(replace(TOY, name="first", before="segments"))
    assert (plan.backend, capped.backend) == ("first", "first")
    assert "backend   first: dense over the whole batch" in plan.explain()
    assert fj.plan(make_qkv([30])[0], normalizer=fj.SiLU()).backend in ("segments", "tiled", "cpp")  # by their costs


def test_a_plan_sees_what_was_registered_and_removed_since() -> None:
    """It remembers its backend; once that was gone, attention failed by a KeyError."""
    q, k, v = make_qkv([30], dtype=torch.float32)
    plan = fj.plan(q, score=fj.SoftCap(3.0))
    ran: list[str] = []

    def run(*args: object) -> object:
        ran.append("late")
        return TOY.run(*args)

    wanted = fj.attention(q, k, v, plan=plan)
    register(replace(TOY, name="late", before="tiled", run=run))
    fj.attention(q, k, v, plan=plan)
    assert (plan.backend, ran) == ("late", ["late"])
    unregister("late")
    assert plan.backend == "tiled"
    assert torch.equal(fj.attention(q, k, v, plan=plan).values, wanted.values)
    assert ran == ["late"]


def test_only_what_was_registered_is_removed() -> None:
    for name in ("tiled", "none"):
        with pytest.raises(BackendError, match=rf"name: must be a backend that register\(\) added; got name='{name}'"):
            unregister(name)
    with pytest.raises(BackendError, match="backend: must be a Backend; got type='str'"):
        register("toy")  # type: ignore[arg-type]


def test_what_a_record_forgot_is_said(add: Callable[[Backend], None]) -> None:
    q, k, v = make_qkv([30], dtype=torch.float32)
    add(replace(TOY, name="no tiles", run=lambda q, k, v, recipe, scale, need_rest: recipe.tiles))
    with pytest.raises(PlanError, match="tiles: are made for backends whose record says needs_tiles=True"):
        fj.attention(q, k, v, backend="no tiles")
    add(replace(TOY, name="no rest", run=lambda *args: (TOY.run(*args)[0], None)))
    with pytest.raises(AssertionError, match="backend 'no rest' promises a log-sum-exp or remainder"):
        fj.attention(q, k, v, backend="no rest", return_lse=True)


def test_names_are_taken_once() -> None:
    for name in ("toy", "tiled", "auto"):
        with pytest.raises(BackendError, match="name: is taken"):
            register(replace(TOY, name=name))
    with pytest.raises(BackendError, match="before: must be a backend that auto asks; got before='reference'"):
        register(replace(TOY, name="other", before="reference"))
