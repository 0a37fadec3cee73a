"""Does planning with bounds, and attention with such plans, ever wait for the GPU? ``python -m flexjag.bench.sync``.

PyTorch can raise where an operation waits for the device. Under it, several batches of different lengths are planned
and attended, forward and backward, as a training loop would.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexjag.attention import attention
from flexjag.bench.lengths import lognormal_lengths
from flexjag.bench.measure import describe_error
from flexjag.jagged import Jagged
from flexjag.masks import Causal, Mask, Prefix, Window
from flexjag.plan import plan

STEPS = 5
SEGMENTS, LONGEST, HEADS, DIM = 16, 512, 4, 64
MASKS: dict[str, Mask] = {"causal": Causal(), "window and prefix": Causal() & (Window(64, 0) | Prefix(4))}


def check(device: str) -> dict[str, Any]:
    """Run the steps.

    Args:
        device: ``"cuda"``; on ``"cpu"`` the steps run too, and prove nothing.

    Returns:
        ``passed`` (None on a CPU), ``detail`` in words, and ``steps``.
    """
    torch.manual_seed(0)
    # Batches come from a data loader that copies ahead; here they are all there before the first step.
    batches = [(_values(device), _offsets(seed, device)) for seed in range(STEPS)]
    for name, mask in MASKS.items():
        try:
            _train(batches[:2], mask)  # what is compiled on first use may wait
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                _train(batches, mask)
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        except Exception as e:  # whatever is thrown is the result
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
    """``[T, H, D]`` with rows for the longest segments that there may be; most are spare."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return torch.randn(SEGMENTS * LONGEST, HEADS, DIM, device=device, dtype=dtype, requires_grad=True)


def _offsets(seed: int, device: str) -> Tensor:
    lengths = torch.tensor([0, *lognormal_lengths(SEGMENTS, LONGEST, seed)], dtype=torch.int32)
    return lengths.cumsum(0, dtype=torch.int32).to(device, non_blocking=True)


if __name__ == "__main__":
    print(json.dumps(check(sys.argv[1])))
