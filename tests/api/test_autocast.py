"""Inputs of several dtypes under autocast, as a norm or a rotation in float32 leaves them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import flexjag as fj
from flexjag.errors import ShapeError

LENGTHS = [5, 0, 9, 1]
DTYPES = [
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.bfloat16, torch.float32),
]


def inputs(dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(sum(LENGTHS), 2, 8, generator=g).to(t).requires_grad_() for t in dtypes]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch = fj.Jagged.from_lengths(q, LENGTHS)
    return fj.attention(batch, batch.with_values(k), batch.with_values(v), mask=fj.Causal()).values


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_differing_dtypes_become_autocasts(dtypes: tuple[torch.dtype, ...]) -> None:
    """Bit by bit as inputs cast by hand, in the dtype that PyTorch's attention returns; gradients in those given."""
    given = inputs(dtypes)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*given)
        theirs = scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in given))
    assert out.dtype == theirs.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), given)
    assert [x.dtype for x in grads] == list(dtypes)
    cast = [x.detach().bfloat16().requires_grad_() for x in given]
    want = attend(*cast)
    assert torch.equal(out, want)
    for found, wanted in zip(grads, torch.autograd.grad(want.float().sum(), cast), strict=True):
        assert torch.equal(found, wanted.to(found.dtype))


def test_in_a_graph() -> None:
    given = inputs(DTYPES[0])

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attend(q, k, v)

    out = torch.compile(fn, fullgraph=True, backend="aot_eager")(*given)
    assert out.dtype == torch.bfloat16
    # In graphs `auto` may take another backend: a rounding of the output, one of the weights.
    torch.testing.assert_close(out, fn(*given), rtol=2**-7, atol=2**-7)


def test_one_dtype_stays_as_it_is() -> None:
    given = inputs((torch.float32,) * 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(*given), attend(*given))
        assert attend(*given).dtype == torch.float32


def test_without_autocast_and_in_float64_they_are_refused() -> None:
    with pytest.raises(ShapeError, match="dtype"):
        attend(*inputs(DTYPES[0]))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ShapeError, match="dtype"):
        attend(*inputs((torch.float64, torch.float32, torch.float32)))
    with torch.autocast("cpu", torch.bfloat16, enabled=False), pytest.raises(ShapeError, match="dtype"):
        attend(*inputs(DTYPES[0]))
