"""Derivatives of any order and mode: every ragged op against the same derivative of a plain loop over segments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from ops_table import OPS, both, others
from test_ops import EPS, tuple_of
from torch import Tensor
from torch.autograd import forward_ad

import flexjag.ops
from flexjag import Jagged
from flexjag.errors import DifferentiationError
from flexjag.ops.register import OPERATORS

LENGTHS = [2, 0, 3]
A, B = both(LENGTHS)

Call = Callable[..., tuple[Tensor, ...]]

# The first forward-mode derivative of a process imports decompositions of PyTorch's own, which use its old compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


def normalized(a: list[int], b: list[int], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The loop of the table calls ``layer_norm``, whose third derivatives are wrong (seen in torch 2.13)."""
    centered = [t - t.mean() for t in x.split(a) if len(t)]
    return torch.cat([t * (t.square().mean() + 1e-5).rsqrt() for t in centered]) * weight + bias


LOOPS = {name: op.loop for name, op in OPS.items()} | {"jagged_layer_norm, segment": normalized}


def the_two(name: str) -> tuple[Call, Call, list[Tensor]]:
    """The op and the loop as functions of the operands, and those."""
    op, loop = OPS[name], LOOPS[name]
    return (
        lambda *t: tuple_of(op.run(A, B, *t)),
        lambda *t: tuple_of(loop(LENGTHS, others(LENGTHS), *t)),
        [t.detach() for t in op.operands(LENGTHS)],
    )


def alike(got: object, want: object) -> None:
    """Equal but for the order of sums, of no more than some thousand products."""
    torch.testing.assert_close(got, want, rtol=2**12 * EPS, atol=2**12 * EPS)


def energy(call: Call, *operands: Tensor) -> Tensor:
    """A number that depends on the operands by the op and around it: the residual path keeps every graph alive."""
    return sum(r.pow(3).sum() for r in call(*operands)) + sum(t.pow(3).sum() for t in operands)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("name", OPS)
def test_second_and_third_derivatives_beside_a_residual_path(name: str) -> None:
    found = []
    *calls, operands = the_two(name)
    for call in calls:
        leaves = [t.clone().requires_grad_() for t in operands]
        value, orders = energy(call, *leaves), []
        for _ in range(3):
            grads = torch.autograd.grad(value, leaves, create_graph=True)
            orders.append([g.detach() for g in grads])
            value = torch.stack([g.pow(2).sum() for g in grads]).sum()
        found.append(orders)
    alike(*found)


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_equal_differences(name: str) -> None:
    op = OPS[name]
    assert torch.autograd.gradgradcheck(lambda *t: op.run(A, B, *t), op.operands(LENGTHS), fast_mode=True)


@pytest.mark.parametrize("name", OPS)
def test_transforms(name: str) -> None:
    """``torch.func``: reverse mode, forward mode, one over the other, and batches of batches."""
    run, loop, operands = the_two(name)
    every = tuple(range(len(operands)))
    tangents = tuple(t.roll(1, 0) + 0.5 for t in operands)

    def first(call: Call) -> Callable[[Tensor], Tensor]:
        return lambda x: energy(call, x, *operands[1:])

    for transform in (
        lambda call: torch.func.grad(partial(energy, call), argnums=every)(*operands),
        lambda call: torch.func.jvp(call, tuple(operands), tangents),
        lambda call: torch.func.hessian(first(call))(operands[0]),
        lambda call: torch.func.jacrev(torch.func.jacrev(first(call)))(operands[0]),
    ):
        alike(transform(run), transform(loop))
    batch = [torch.stack([t, 2 * t], -1) for t in operands]
    got = torch.vmap(run, in_dims=-1, out_dims=-1)(*batch)
    for i in range(2):
        alike(tuple(x[..., i] for x in got), loop(*[t[..., i] for t in batch]))


@pytest.mark.parametrize("name", OPS)
def test_dual_numbers(name: str) -> None:
    found = []
    *calls, operands = the_two(name)
    for call in calls:
        with forward_ad.dual_level():
            results = call(*[forward_ad.make_dual(t, t.roll(1, 0)) for t in operands])
            found.append([forward_ad.unpack_dual(r).tangent for r in results])
    alike(*found)


INTEGERS = ("repeat_arange", "sorted_unique", "true_at")
"""Operators of FBGEMM's names that give integers, which have no gradients, by plain torch on every device."""


def test_every_operator_has_a_formula() -> None:
    assert OPERATORS
    assert [name for name, op in OPERATORS.items() if op.formula is None and name not in INTEGERS] == []


def test_transforms_of_what_is_not_called_by_python_are_refused() -> None:
    """A compiled graph holds operators, which PyTorch would differentiate to zeros without a word."""
    x = torch.randn(5, 3)
    for transform in (
        lambda f: torch.func.jvp(f, (x,), (x,)),
        lambda f: torch.func.grad(lambda x: f(x).sum())(x),
    ):
        with pytest.raises(DifferentiationError, match=r"segment_softmax: .* eager mode"):
            transform(lambda x: torch.ops.flexjag.segment_softmax(x, A))


def test_second_derivatives_of_a_compiled_graph_are_refused() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    run = torch.compile(lambda x, a: flexjag.ops.jagged_softmax(Jagged(x, a)).values, backend="aot_eager")
    (grad,) = torch.autograd.grad((x + run(x, A)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.sum(), x)
