"""The functions of ``math.h``: errors of a few units in the last place, and right at 0, infinities and NaN."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import pytest
import torch
from printed_cpp import REALS, compiled, unit
from torch import Tensor

FUNCTIONS = {
    "exp": 2, "exp2": 3, "log": 2, "log2": 2, "sqrt": 1, "rsqrt": 2, "sin": 3, "cos": 3, "erf": 2, "tanh": 4,
    "sigmoid": 3, "floor": 0, "ceil": 0, "abs": 0,
}  # fmt: skip
"""Functions, each with its largest error in units in the last place."""
SPECIAL = [0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 3e38, -3e38, 89.0, 2e6, -150.0, 127.9]
EVERY = """
#define EVERY(name)                                                             \\
  extern "C" void lanes_##name(real* y, const real* x, int64_t n) {             \\
    for (int64_t i = 0; i < n; i += LANES) store_row(y + i, name(load_row(x + i))); \\
  }                                                                             \\
  extern "C" void scalar_##name(real* y, const real* x, int64_t n) {            \\
    for (int64_t i = 0; i < n; i++) y[i] = name(x[i]);                          \\
  }
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], ctypes.CDLL]:
    source = "\n".join([EVERY, *[f"EVERY({name})" for name in FUNCTIONS]])
    return cache(lambda real: compiled(unit(real, source), tmp_path_factory.mktemp("math"), "-O2"))


def called(library: ctypes.CDLL, name: str, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    getattr(library, name)(ctypes.c_void_p(y.data_ptr()), ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(len(x)))
    return y


def arguments(name: str, real: torch.dtype) -> Tensor:
    """Numbers of all sizes for which the result is a normal number."""
    generator = torch.Generator().manual_seed(1)
    sizes = 10 ** (torch.rand(40000, generator=generator, dtype=torch.float64) * 12 - 9)
    x = torch.randn(40000, generator=generator, dtype=torch.float64) * sizes
    bound = {"exp": 80.0, "exp2": 120.0, "sigmoid": 80.0}.get(name, 1e6)
    return (x.abs() if name in ("log", "log2", "sqrt", "rsqrt") else x.clamp(-bound, bound)).to(real)


@pytest.mark.parametrize("real", REALS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_are_a_few_units_in_the_last_place(
    built: Callable[[torch.dtype], ctypes.CDLL], name: str, real: torch.dtype
) -> None:
    x = arguments(name, real)
    wanted = getattr(torch, name)(x.double())
    spacing = wanted.abs().clamp(min=torch.finfo(real).tiny) * torch.finfo(real).eps / 2  # at least half a unit
    allowed = (2 * FUNCTIONS[name] + (real == torch.float64)) * spacing  # torch's own float64 is one off, too
    for kind in ("lanes", "scalar"):
        error = (called(built(real), f"{kind}_{name}", x).double() - wanted).abs()
        worst = int((error - allowed).argmax())
        assert error[worst] <= allowed[worst], (kind, x[worst], error[worst] / spacing[worst])


@pytest.mark.parametrize("real", REALS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_extremes_are_torchs(built: Callable[[torch.dtype], ctypes.CDLL], name: str, real: torch.dtype) -> None:
    x = torch.tensor([*SPECIAL, torch.finfo(real).tiny], dtype=real)
    wanted = getattr(torch, name)(x)
    for kind in ("lanes", "scalar"):
        found = called(built(real), f"{kind}_{name}", x)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-37, equal_nan=True)
    if name in ("exp", "exp2"):
        assert found[SPECIAL.index(-torch.inf)] == 0
