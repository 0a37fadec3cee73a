"""The drop-ins beside FBGEMM itself, on CPU: signatures, results, gradients, and what comes back besides values."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import warnings

import pytest
import torch
from fbgemm_loops import Batch, D, offsets_of
from fbgemm_table import CASES, Case, close, outcome
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexjag.interop import fbgemm
from flexjag.testing import lengths as lengths_strategy

pytest.importorskip("fbgemm_gpu", exc_type=(ImportError, OSError))  # built for one torch
pytest.importorskip("fbgemm_gpu.sll")
theirs = torch.ops.fbgemm

EXTRA_DEFAULTS = {"allow_tf32", "padding_value"}
"""Arguments that FBGEMM's schemas want, though the functions behind them have defaults."""


@pytest.mark.parametrize("name", fbgemm.__all__)
def test_signature(name: str) -> None:
    """The same names in the same order; a default where FBGEMM has one, and the same one."""
    wanted = getattr(theirs, name).default._schema.arguments
    ours = list(inspect.signature(getattr(fbgemm, name)).parameters.values())
    assert [p.name for p in ours] == [a.name for a in wanted]
    for p, a in zip(ours, wanted, strict=True):
        if a.has_default_value():
            assert p.default == a.default_value
        else:
            assert p.default is p.empty or p.name in EXTRA_DEFAULTS


def written(case: Case, b: Batch, found: list[Tensor]) -> list[Tensor]:
    """Zeros for what FBGEMM does not write."""
    return found if case.written else [torch.where(b.keep[:, None], x, 0) for x in found]


def compare(name: str, b: Batch, seed: int) -> None:
    case = CASES[name]
    if name.startswith(("jagged_index_select", "sll_dense_jagged_cat")) and not b.lengths:
        return  # FBGEMM raises
    if case.oracle == "only short" and b.cuts:
        return
    gradient = case.oracle == "same" or (case.oracle in ("short", "only short") and not b.cuts)
    # Made of a constant only, so FBGEMM's result does not see the values; or its bias gradient is never written.
    unseen = (name.startswith("sll_jagged2_to_padded") and not sum(b.lengths)) or (
        name.startswith("sll_jagged_self_sub") and max(b.lengths, default=0) < 2
    )
    gradient = gradient and not unseen and not (name.endswith("short bias") and b.size < 2)
    operands = case.operands(b, torch.float32, seed)
    got = outcome(lambda *x: case.run(fbgemm, b.arguments, *x), operands, gradient=gradient)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FBGEMM's own
        wanted = outcome(lambda *x: case.run(theirs, b.arguments, *x), operands, gradient=gradient)
    close(written(case, b, got), written(case, b, wanted), b)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.oracle != "none"])
@given(
    lengths=lengths_strategy(max_total=60),
    size=st.integers(1, 30),
    inner=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 99),
)
def test_equals_fbgemm(
    name: str, lengths: list[int], size: int, inner: list[int], dtype: torch.dtype, seed: int
) -> None:
    compare(name, Batch(tuple(lengths), size, dtype, tuple(inner)), seed)
    compare(name, Batch(tuple(lengths), max(lengths, default=0) + 1, dtype, tuple(inner)), seed)


INTEGERS = torch.arange(1, 11)
X = torch.arange(10.0).view(5, 2)
OFFSETS = torch.tensor([0, 2, 2, 5])
DENSE = torch.arange(12.0).view(3, 2, 2)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("asynchronous_complete_cumsum", lambda o: (o.diff(),)),
        ("asynchronous_complete_cumsum", lambda o: (torch.stack([o, o]),)),
        ("jagged_to_padded_dense", lambda o: (INTEGERS[:5], [o], [3], -1.7)),
        ("jagged_to_padded_dense", lambda o: (X.half(), [o], [0])),
        ("jagged_1d_to_dense", lambda o: (INTEGERS[:5], o, 2, -1)),
        ("stacked_jagged_1d_to_dense", lambda o: (INTEGERS, torch.stack([o.diff(), o.diff()]), [0, 5, 10], [1, 4], -1)),
        ("dense_to_jagged", lambda o: (DENSE.long(), [o])),
        ("dense_to_jagged", lambda o: (DENSE, [o], 7)),
        ("jagged_dense_elementwise_add_jagged_output", lambda o: (X, [o], DENSE.half())),
        ("jagged_dense_elementwise_add_jagged_output", lambda o: (X[:, :1], [o], DENSE)),
        ("jagged_dense_elementwise_add_jagged_output", lambda o: (X.long(), [o], DENSE.long())),
        ("jagged_dense_elementwise_add", lambda o: (X, [o], DENSE[:, :, :1])),
        ("jagged_dense_dense_elementwise_add_jagged_output", lambda o: (X, [o], DENSE[:, :1], DENSE)),
        ("jagged_dense_elementwise_mul", lambda o: (X.long(), [o], DENSE.long())),
        ("jagged_dense_elementwise_mul", lambda o: (X.half(), [o], DENSE)),
        ("jagged_index_select", lambda o: (X, o.diff(), torch.tensor([2, 0, 2]))),
        ("jagged_index_select", lambda o: (X.long(), o.diff(), torch.tensor([2, 0, 2], dtype=torch.int32), 6)),
        ("jagged_index_select", lambda o: (X, o.diff()[:2], torch.tensor([1, 0]))),
        ("jagged_softmax", lambda o: (X, o, 3)),
        ("jagged_dense_bmm", lambda o: (X, o, DENSE, 3)),
        ("jagged_dense_bmm", lambda o: (X, o[:3], DENSE[:2], 3)),
        ("jagged_dense_bmm", lambda o: (X, o + torch.tensor([1, 0, 0, 0], dtype=o.dtype), DENSE, 3)),
        ("jagged_jagged_bmm", lambda o: (X, X, o[1:3], 3)),
        ("jagged_to_padded_dense", lambda o: (X, [o[1:]], [2])),
        ("batched_dense_vec_jagged_2d_mul", lambda o: (torch.ones(4, 3), X, o[:3])),
        ("sll_dense_jagged_cat_jagged_out", lambda o: (INTEGERS[:3], X[:, 0], o, 3)),
        ("sll_jagged_self_substraction_jagged_out", lambda o: (INTEGERS[:5], o, offsets_of([1, 0, 4], o.dtype), 2)),
    ],
)
def test_types_and_quirks(name: str, arguments: object, dtype: torch.dtype) -> None:
    """Exact numbers: dtypes, promotion, other orders of size, offsets of a part of the rows."""
    given_ = arguments(OFFSETS.to(dtype))  # type: ignore[operator]
    got, wanted = getattr(fbgemm, name)(*given_), getattr(theirs, name)(*given_)
    assert type(got) is type(wanted)
    torch.testing.assert_close(got, wanted)


MULTI_HEAD = """
import torch
from fbgemm_gpu.sll.triton.triton_multi_head_jagged_flash_attention import multi_head_jagged_flash_attention
operands, offsets, size, direction = torch.load("given.pt")
out = multi_head_jagged_flash_attention(*operands, offsets, size, False)
torch.save([out.detach(), *torch.autograd.grad(out, operands, direction)], "found.pt")
"""


@pytest.mark.parametrize("size", [9, 4])
def test_multi_head_attention_equals_the_kernel(size: int, tmp_path: object) -> None:
    """FBGEMM has it for CUDA only: its Triton kernels, interpreted."""
    pytest.importorskip("triton")
    b = Batch((3, 0, 9), size)
    name = "sll_multi_head_jagged_flash_attention"
    operands = CASES[name].operands(b, torch.float32)
    direction = torch.rand(operands[0].shape) * 2 - 1
    torch.save((operands, b.arguments.offsets, size, direction), f"{tmp_path}/given.pt")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MULTI_HEAD],
        cwd=str(tmp_path),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    out = CASES[name].run(fbgemm, b.arguments, *operands)
    got = [out.detach(), *torch.autograd.grad(out, operands, direction)]
    assert got[0].shape[-1] == D
    close(got, torch.load(f"{tmp_path}/found.pt"), b)
