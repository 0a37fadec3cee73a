"""Lowering for a GPU asks nothing about sizes that vary but whether they fit in 32 bits: one graph for every batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo  # marks which sizes vary only once it is loaded
from cases import make_qkv

import flexjag as fj
from flexjag.codegen.compile import _job
from flexjag.codegen.payload import Meta
from flexjag.codegen.targets import get_target
from flexjag.codegen.worker import Worker

HERE = __name__
FITS = re.compile(r".* <= (n \+ )?2147483647")
NARROW = {"n >= n", "Ne(Mod(n, n), 0)"}
"""A table's columns are fewer than its width, whatever the batch: see `flexjag.lowering.tiles`."""


def guards(structure: bytes, metas: Sequence[Meta], target: Any) -> list[str]:
    """What lowering adds to the conditions under which a graph is taken; for a worker."""
    from flexjag.codegen import jobs
    from flexjag.codegen.make import capture, lower

    torch._dynamo.reset()
    jobs._settle(target)
    graphs, _ = capture.capture(structure, metas, True, {})
    found, rehome = [], lower._rehome

    def watched(graph: capture.Graph) -> Any:
        mode, inputs = rehome(graph)
        found.append((mode.shape_env, len(mode.shape_env.guards)))
        return mode, inputs

    with mock.patch.object(lower, "_rehome", watched):
        lower.lower(graphs)
    return sorted({str(guard.expr) for env, before in found for guard in env.guards[before:]})


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("lengths", [[300, 7], [5, 9]], ids=str)
def test_no_size_decides_which_graph_is_taken(lengths: list[int], groups: int) -> None:
    q, k, v = make_qkv(lengths, heads=4, groups=groups, dim=64, dtype=torch.bfloat16)
    plan = fj.plan(q, mask=fj.Causal() | fj.Prefix(3))
    job = _job(plan, (q, k, v), True, None, None, False, {})
    with Worker() as worker:
        asked = worker.call(
            "call_function", HERE, "guards", job.payload.structure, job.payload.metas, get_target("sm_90")
        )
    forms = {re.sub(r"s\d+", "n", x) for x in asked}
    assert not {x for x in forms if not FITS.fullmatch(x)} - NARROW, asked
    assert asked, "lowering is expected to ask whether indices fit"
