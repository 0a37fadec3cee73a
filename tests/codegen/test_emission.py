"""What flexjag emits for a GPU, shown from compiled code: no gathers by key, no spills, no needless bounds checks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from cases import make_qkv, mostly_slow

import flexjag as fj
from flexjag.backends.flex.options import _blocks, reads_by_key
from flexjag.codegen.compile import Report
from flexjag.codegen.show.page import GPUS, PlainFlex, _causal, _document, masks_and_scores, per_score
from flexjag.codegen.worker import Worker
from flexjag.testing import assert_kernels_match

pytest.importorskip("triton")
SPANS = ["`Full()`", "`Causal() & (Window(256, 0) | Prefix(4))`", "`Rows`, 2 spans", "`PerHead`, 2 masks"]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as running:
        yield running


def batch(dim: int = 64) -> fj.Jagged:
    values = torch.zeros(4100, 8, dim, dtype=torch.bfloat16)
    return fj.Jagged.from_lengths(values, [3000, 1000, 100])


def compiled(worker: Worker, mask: fj.Mask, score: fj.Score | None = None, dim: int = 64) -> Report:
    x = batch(dim)
    return fj.compile_for("sm_90", fj.plan(x, mask=mask, score=score), x, x, x, worker=worker, cache=False)


@pytest.mark.parametrize("name", mostly_slow(SPANS, "`Causal() & (Window(256, 0) | Prefix(4))`"))
def test_masks_of_spans_gather_nothing_by_key_and_spill_nothing(name: str, worker: Worker) -> None:
    report = compiled(worker, masks_and_scores()[name][0])
    for phase, loops in (("forward", 2), ("backward", 4)):
        kernel = report[phase]
        assert len(kernel.loops) == loops
        assert all(loop.over in ("kv", "q") for loop in kernel.loops)
        assert kernel.kv_indexed == 0
        operands = [sum(x.count for x in loop.loads if x.kind == "operand") for loop in kernel.loops]
        assert min(operands) >= 2  # the analysis sees K and V, so it would see another
        assert kernel.spilled_bytes == 0
        assert kernel.loop_instructions is not None


@pytest.mark.slow
def test_the_document_mask_gathers_by_key_and_takes_more_instructions(worker: Worker) -> None:
    pytest.importorskip("attn_gym")
    ours = compiled(worker, fj.Causal())
    x = batch()
    q, k, v = (x.with_values(x.values.clone().requires_grad_()) for _ in range(3))
    document = PlainFlex(fj.plan(x, mask=fj.Causal()), _document(_causal, x.offsets))
    theirs = fj.compile_for("sm_90", document, q, k, v, worker=worker, cache=False)
    for phase in ("forward", "backward"):
        assert theirs[phase].kv_indexed >= 1
        masked = [[per_score(r[phase], x) for x in r[phase].loops if x.masked] for r in (ours, theirs)]
        assert sum(x or 0 for x in masked[0]) < sum(x or 0 for x in masked[1])


@pytest.mark.slow
def test_lookups_that_cannot_be_negative_are_not_tested_for_it(worker: Worker) -> None:
    """A table of a user's is counted from its end where an index is negative; nodes of ours do not pay for that."""
    x, table = batch(), torch.ones(8, 9, requires_grad=True)
    user = fj.ScoreMod(lambda s, b, h, q, kv: s + table[h, (q - kv) % 5 - 7])
    ours = fj.RelativeBias(table) >> fj.BucketedBias(table[:, :5], torch.arange(4) * 8)
    mask = fj.PerHead([fj.Dense(torch.ones(4100, 4100, dtype=torch.bool)), fj.SameGroup(torch.arange(4100) // 7)] * 4)
    for score, found in ((ours, 0), (user, 1)):
        plan = fj.plan(x, mask=mask, score=score)
        report = fj.compile_for("sm_90", plan, x, x, x, backward=False, assemble=False, worker=worker, cache=False)
        assert len(re.findall(r"tl\.where\(\w+ < 0, ", report.wrappers["forward"])) == found


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
def test_heavy_plans_spill_nothing_in_16_bits(dim: int, worker: Worker) -> None:
    """A learned table takes the most registers, and default options ask for more shared memory than there is."""
    score = fj.RelativeBias(torch.ones(8, 257, requires_grad=True))
    report = compiled(worker, fj.Causal(), score, dim)
    is_old = dim == 128 and version("triton").startswith("3.6.")
    for kernel in report.shown:
        assert kernel.spilled_bytes <= (8 if is_old else 0)  # Triton 3.6 spills two registers in the backward
        assert kernel.shared_bytes <= report.target.shared_per_block


@pytest.mark.slow
def test_a_fixed_number_of_whole_tiles_needs_no_bounds_checks(worker: Worker) -> None:
    x = fj.Jagged.from_lengths(torch.zeros(4096, 8, 64, dtype=torch.bfloat16), [3000, 1000, 96])
    made = {}
    for tokens in (None, 4096):
        plan = fj.plan(x, mask=fj.Causal(), max_tokens=tokens)
        made[tokens] = fj.compile_for("sm_90", plan, x, x, x, backward=False, worker=worker, cache=False)["forward"]
    assert not made[None].constants["IS_DIVISIBLE"]
    assert made[4096].constants["IS_DIVISIBLE"]
    assert (made[4096].loop_instructions or 0) < 0.8 * (made[None].loop_instructions or 0)


@pytest.mark.slow
def test_what_is_per_token_is_padded_once_per_plan(worker: Worker) -> None:
    """No kernel but the attention itself: nothing is left to do per layer."""
    x = batch()
    plan = fj.plan(x, mask=fj.Causal() & fj.SameGroup(torch.arange(4100) // 50))
    report = fj.compile_for("sm_90", plan, x, x, x, backward=False, assemble=True, worker=worker, cache=False)
    assert [k.phase for k in report.kernels] == ["forward"]


@pytest.mark.slow
def test_a_plan_made_inside_a_graph_is_lowered_for_inference(worker: Worker) -> None:
    """Inductor fails if a mod reads a padded tensor that the graph has not written yet."""

    def attend(x: fj.Jagged) -> fj.Jagged:
        return fj.attention(x, x, x, mask=fj.Causal() & fj.Window(30, 0), score=fj.Alibi.from_heads(8))

    report = fj.compile_for("sm_90", attend, batch(), backward=False, assemble=False, worker=worker, cache=False)
    assert "flex_attention" in report.wrappers["forward"]


@pytest.mark.slow
def test_a_wrong_kernel_is_noticed() -> None:
    """The kernels come from a causal plan, the reference is told another mask."""
    qkv = make_qkv([20, 0, 30], dtype=torch.float32, dim=32)
    plan = fj.plan(qkv[0], mask=fj.Causal())
    with Worker(interpret=True) as running:
        assert_kernels_match(plan, *qkv, worker=running)
        with pytest.raises(AssertionError, match=r"flex on sm_90 differs from the reference.*out\[.*grad_q"):
            assert_kernels_match(replace(plan, mask=fj.Causal() & fj.Window(12, 0)), *qkv, worker=running)


@pytest.mark.slow
def test_options_fit_the_gpu_and_what_is_read() -> None:
    for target in GPUS:
        capability = int(target[3:-1]), int(target[-1])
        for dim in (16, 64, 128):
            for by_key in (False, True):
                options = _blocks(capability, dim, by_key)
                for name, size in options.items():
                    assert "BLOCK" not in name or 128 % size == 0
    assert _blocks((12, 0), 64, False) == {}
    assert _blocks((8, 6), 64, False) == {}
    x = batch()
    some = {name: reads_by_key(fj.plan(x, mask=m, score=s)) for name, (m, s) in masks_and_scores().items()}
    assert {name for name, found in some.items() if found} == {
        "`Dense`",
        "`Causal() & MaskMod`",
        "`Causal()`, learned `RelativeBias`",
        "`Causal()`, `ScoreMod`",
    }
