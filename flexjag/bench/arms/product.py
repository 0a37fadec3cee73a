"""A square matrix product: its rate is the one beside which those of attention are read."""

from __future__ import annotations

import torch

from flexjag.bench.measuring.padded import Expected
from flexjag.bench.suites.registry import Arm

PRODUCT = "torch.mm"


def product(side: int, dtype: torch.dtype, device: str, seed: int) -> Arm:
    """The arm that multiplies two random matrices ``[side, side]``."""
    generator = torch.Generator(device).manual_seed(seed)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    expected = Expected(lambda dtype: (a.to(dtype) @ b.to(dtype),), a.dtype, terms=side)
    return Arm(PRODUCT, lambda: lambda: (a @ b,), expected.check, memory=False)


def product_flops(side: int) -> int:
    """Floating-point operations of the product."""
    return 2 * side**3
