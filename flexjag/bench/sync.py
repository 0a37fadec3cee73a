"""Check that planning with bounds, and attention with such plans, never wait for the GPU.

Run ``python -m flexjag.bench.sync DEVICE``. With PyTorch's sync debug mode, which raises where an operation waits for
the device, several batches of different lengths are planned and attended, forward and backward, as in a training loop.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexjag.algebra.masks import Causal, Mask, Prefix, Window
from flexjag.api.attention import attention
from flexjag.api.plan import plan
from flexjag.bench.measuring.lengths import lognormal_lengths
from flexjag.bench.measuring.measure import describe_error
from flexjag.jagged import Jagged

STEPS = 5
SEGMENTS, LONGEST, HEADS, DIM = 16, 512, 4, 64
MASKS: dict[str, Mask] = {"causal": Causal(), "window and prefix": Causal() & (Window(64, 0) | Prefix(4))}


def check(device: str) -> dict[str, Any]:
    """Run the training steps and report synchronizations with the device.

    Args:
        device: ``"cuda"``; on ``"cpu"`` the steps run too, but nothing is checked.

    Returns:
        ``passed`` (None on a CPU), ``detail`` as text, and the number of ``steps``.
    """
    torch.manual_seed(0)
    # A data loader copies batches ahead of time; here all are on the device before the first step.
    batches = [(_values(device), _offsets(seed, device)) for seed in range(STEPS)]
    for name, mask in MASKS.items():
        try:
            _train(batches[:2], mask)  # compilation on first use may wait
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                _train(batches, mask)
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        except Exception as e:  # any exception is a failed check
            return {"passed": False, "detail": f"{name}: {describe_error(e)}", "steps": STEPS}
    detail = f"{STEPS} batches for each of: {', '.join(MASKS)}; forward and backward."
    if device != "cuda":
        return {"passed": None, "detail": f"{detail} A CPU has nothing to wait for.", "steps": STEPS}
    return {"passed": True, "detail": detail, "steps": STEPS}


def _train(batches: Sequence[tuple[Tensor, Tensor]], mask: Mask) -> None:
    for values, offsets in batches:
        q = Jagged(values, offsets)
        made = plan(q, mask=mask, max_tokens=values.shape[0], max_length=LONGEST)
        out = attention(q, q, q, plan=made)
        assert isinstance(out, Jagged)
        out.values.sum().backward()
        assert values.grad is not None


def _values(device: str) -> Tensor:
    """Values ``[SEGMENTS·LONGEST, H, D]``: capacity for segments of maximum length, most of it unused."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return torch.randn(SEGMENTS * LONGEST, HEADS, DIM, device=device, dtype=dtype, requires_grad=True)


def _offsets(seed: int, device: str) -> Tensor:
    lengths = torch.tensor([0, *lognormal_lengths(SEGMENTS, LONGEST, seed)], dtype=torch.int32)
    return lengths.cumsum(0, dtype=torch.int32).to(device, non_blocking=True)


if __name__ == "__main__":
    print(json.dumps(check(sys.argv[1])))
