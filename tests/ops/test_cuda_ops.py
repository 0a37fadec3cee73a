"""Every ragged op on a GPU, through its Triton kernels: against loops on the CPU, twice the same, and never waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import CUDA_ONLY, EDGE_LENGTHS, check_error
from ops_table import OPS, both, others
from test_ops import tuple_of, with_gradients
from test_ops_registered import REGISTERED
from test_triton_ops import DIRECT, cast
from torch import Tensor

from flexjag.ops.register import OPERATORS

pytestmark = CUDA_ONLY

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def to_gpu(given: object) -> object:
    if isinstance(given, tuple | list):
        return type(given)(to_gpu(x) for x in given)
    return given.cuda() if isinstance(given, Tensor) else given


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_equals_a_loop_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    op = OPS[name]
    for lengths in EDGE_LENGTHS.values():
        operands = op.operands(lengths, dtype)
        a, b = (o.cuda() for o in both(lengths, torch.int32 if len(lengths) % 2 else torch.int64))
        found = with_gradients(lambda *t, a=a, b=b: op.run(a, b, *t), [t.detach().cuda() for t in operands])
        exact = [t.double() for t in operands]
        same, true = (
            with_gradients(lambda *t, n=lengths: op.loop(n, others(n), *t), leaves) for leaves in (operands, exact)
        )
        for kind, got, own, wanted in zip(("result", "gradient"), found, same, true, strict=True):
            for i, (x, y, z) in enumerate(zip(got, own, wanted, strict=True)):
                check_error(x.cpu(), y, z, f"{lengths}: {kind} {i}", products=sum(lengths))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DIRECT)
def test_over_several_tiles(name: str, dtype: torch.dtype) -> None:
    operator, (arguments, terms) = OPERATORS[name.split(",")[0]], DIRECT[name]
    rounded = cast(arguments, dtype)
    if name == "target_backward":  # the log-sum-exp stays in float32
        rounded = (*rounded[:6], arguments[6].float(), *rounded[7:])
    found, again = (tuple_of(operator(*to_gpu(rounded))) for _ in range(2))
    same, exact = (tuple_of(operator.kernel(*x)) for x in (rounded, cast(rounded, torch.float64)))
    for i, (x, y, z) in enumerate(zip(found, same, exact, strict=True)):
        check_error(x.cpu(), y, z, f"result {i}", products=terms)
        assert torch.equal(x, again[i])


@pytest.mark.parametrize("name", OPS)
def test_float64_takes_the_plain_kernels(name: str) -> None:
    op, lengths = OPS[name], [5, 0, 40, 3]
    operands = [t.detach() for t in op.operands(lengths)]
    a, b = both(lengths)
    found = with_gradients(lambda *t: op.run(a.cuda(), b.cuda(), *t), [t.cuda() for t in operands])
    wanted = with_gradients(lambda *t: op.run(a, b, *t), operands)
    eps = torch.finfo(torch.float64).eps
    for x, y in zip([*found[0], *found[1]], [*wanted[0], *wanted[1]], strict=True):
        largest = float(y.abs().max()) if y.numel() else 0.0
        torch.testing.assert_close(x.cpu(), y, rtol=0, atol=256 * eps * max(largest, 1.0) ** 2)


KNOWN = [
    name for name in REGISTERED if not any(w in name for w in ("unknown", "longest")) and name not in ("outer", "take")
]
"""Those that are told how large their results are."""


@pytest.mark.parametrize("name", KNOWN)
def test_no_operator_waits(name: str) -> None:
    operator, arguments = REGISTERED[name]
    given = to_gpu(cast(arguments, torch.float32))
    if name == "times_packed":
        given = (*given[:5], int(arguments[2][-1]))
    operator(*given)  # compiles
    torch.cuda.synchronize()
    with no_waiting(), torch.no_grad():
        operator(*given)


@pytest.mark.parametrize("name", ["jagged_softmax", "jagged_dense_bmm", "segment_max", "jagged_layer_norm, segment"])
def test_compiles_to_one_graph(name: str) -> None:
    op = OPS[name]
    compiled = torch.compile(op.run, fullgraph=True, dynamic=True)
    for lengths in ([9, 0, 23], [40, 3, 5, 8, 0]):
        operands = [t.detach().cuda() for t in op.operands(lengths, torch.float32)]
        a, b = (o.cuda() for o in both(lengths))
        found = with_gradients(lambda *t, a=a, b=b: compiled(a, b, *t), operands)
        wanted = with_gradients(lambda *t, a=a, b=b: op.run(a, b, *t), operands)
        eps = torch.finfo(torch.float32).eps
        for x, y in zip([*found[0], *found[1]], [*wanted[0], *wanted[1]], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=64 * eps * max(1.0, float(y.abs().max())))
