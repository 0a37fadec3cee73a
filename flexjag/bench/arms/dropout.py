"""Attention with dropout, by the backends of a CPU and by SDPA with its own ``dropout_p``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexjag.api.attention import attention
from flexjag.api.plan import plan
from flexjag.bench.arms.attention import LOOP, AttentionBatch
from flexjag.bench.arms.cpu import CPP, SEGMENTS
from flexjag.bench.measuring.padded import Tensors
from flexjag.bench.suites.registry import Arm
from flexjag.jagged import Jagged

RATE = 0.1
WITHOUT = f"{CPP}, without dropout"


class DroppedBatch(AttentionBatch):
    """A causal batch, of which each arm drops the share :data:`RATE` of the weights."""

    def dropped(self) -> list[Arm]:
        """Arms: SDPA in a loop, two backends, and one of them without dropout."""
        absent = self._refusal("cpp")
        found = [
            self._random(LOOP, self._loop),
            self._random(SEGMENTS, partial(self._dropping, "segments")),
            self._random(CPP, partial(self._dropping, "cpp"), absent),
            self._arm(WITHOUT, partial(self._flexjag, "cpp"), absent=absent),
        ]
        return [replace(arm, memory=False) for arm in found]

    def _random(self, name: str, forward: Callable[[], Callable[[], Tensor]], absent: str | None = None) -> Arm:
        return replace(self._arm(name, forward, absent=absent), check=self._check)

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "dropout_p": RATE}

    def _dropping(self, backend: str) -> Callable[[], Tensor]:
        q, k, v = self._jagged()
        made = plan(q, k, mask=self.kind.mask)

        def forward() -> Tensor:
            out = attention(q, k, v, plan=made, backend=backend, dropout=RATE)
            assert isinstance(out, Jagged)
            return out.values

        return forward

    def _check(self, got: Tensors) -> str | None:
        """What is wrong if rows are not, in the mean, those without dropout, by six standard errors of all rows."""
        exact = self._exact(torch.float64)[0]
        off = ((got[0].double() - exact) * exact).sum(-1) / exact.square().sum(-1)
        error = float(off.sum().abs() / off.square().sum().sqrt())
        return None if error <= 6 else f"output: its mean is off by {error:.1f} standard errors"
