"""Attention of the suite ``cpp``: the backend ``cpp``, with nodes and with Python functions, and its rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flexjag.algebra.masks import Mask, MaskMod
from flexjag.algebra.scores import Score, ScoreMod
from flexjag.api.attention import attention
from flexjag.api.plan import plan
from flexjag.bench.arms.attention import LOOP, PADDED, SHARED, WITH_PLAN, AttentionBatch
from flexjag.bench.arms.kinds import MAX_DISTANCE
from flexjag.bench.suites.registry import Arm
from flexjag.jagged import Jagged

CPP, SEGMENTS = "flexjag cpp", "flexjag segments"
PLANNED = CPP + WITH_PLAN
IN_PYTHON = f"{CPP}, Python function"


class CpuBatch(AttentionBatch):
    """A batch of attention, and the arms that the backend ``cpp`` is compared with."""

    def chosen(self, *names: str) -> list[Arm]:
        """Arms by name: those of :class:`AttentionBatch`, :data:`PLANNED` and :data:`IN_PYTHON`."""
        arms = {arm.name: arm for arm in super().arms(compiled=False)}
        ready = arms[CPP]
        planned = self._arm(PLANNED, partial(self._flexjag, "cpp", ready=False), absent=ready.absent)
        python = self._arm(IN_PYTHON, self._python, absent=ready.absent)
        arms |= {arm.name: replace(arm, memory=False) for arm in (planned, python)}
        arms |= {name: replace(arms[name], memory=False) for name in (LOOP, PADDED, SHARED)}
        return [arms[name] for name in names]

    def _python(self) -> Callable[[], Tensor]:
        """Prepare attention with the score, or else the mask, as a Python function in place of flexjag's node."""
        q, k, v = self._jagged()
        mask, score = self._functions()
        made = plan(q, k, mask=mask, score=score)

        def forward() -> Tensor:
            out = attention(q, k, v, plan=made, backend="cpp")
            assert isinstance(out, Jagged)
            return out.values

        return forward

    def _functions(self) -> tuple[Mask, Score | None]:
        if self.kind.score == "relative bias":
            table = self.leaves[3]

            def biased(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return s + table[h, torch.clamp(j - i, -MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE]

            return self.kind.mask, ScoreMod(biased)
        allowed = self.kind.allowed
        return MaskMod(lambda b, h, i, j: allowed(i, j)), self._score(self.leaves)
