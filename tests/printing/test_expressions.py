"""Masks' and scores' functions as programs: what is known of torch, what is refused, and derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import make_qkv
from test_choice import case
from torch import Tensor
from torch.nn import functional

import flexjag as fj
from flexjag.algebra.node import node
from flexjag.algebra.normalizers import Pointwise, Sigmoid, SiLU
from flexjag.backends.choose import choose, refusal
from flexjag.errors import BackendError
from flexjag.lowering.layout import Layout
from flexjag.lowering.mods import RowTables, mask_case
from flexjag.printing import Program, Torch, Triton, derivative, functions, has_functions, new_program, objection

TABLE = torch.arange(12.0).view(3, 4)
CPU = torch.device("cpu")
LANGUAGES = (Triton(), Torch())


def test_a_line_is_written_once() -> None:
    program = new_program()
    x = program.symbol("x", torch.float32)
    assert ((x + 1) * (x + 1)).name == "x1"
    assert [line.op for line in program.lines] == ["add", "mul"]


def test_numbers_that_may_be_sizes_are_arguments() -> None:
    program = new_program()
    x = program.symbol("x", torch.int32)
    _ = (x + 63) * 64 + 65.5
    assert program.numbers == [64]


def test_dtypes_are_torchs() -> None:
    program = new_program()
    dtypes = [torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
    for a in dtypes:
        for other in (*dtypes, 2, 2.5):
            x, real = program.symbol("x", a), torch.ones((), dtype=a)
            y = program.symbol("y", other) if isinstance(other, torch.dtype) else other
            real_y = torch.ones((), dtype=other) if isinstance(other, torch.dtype) else other
            assert (x + y).dtype == (real + real_y).dtype, (a, other)
            assert (x / y).dtype == (real / real_y).dtype, (a, other)
            assert (x < y).dtype == torch.bool


ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x + x * 3 - 2 / x,
    "exp": lambda x: torch.exp(x) + torch.exp2(x) * torch.log(x * x + 1) + torch.log2(x * x + 2),
    "roots": lambda x: torch.sqrt(x * x + 1) + torch.rsqrt(x * x + 2) + (x * x) ** 0.5,
    "waves": lambda x: torch.sin(x) * torch.cos(x) + torch.erf(x),
    "smooth": lambda x: functional.silu(x) + functional.gelu(x) * functional.gelu(x, approximate="tanh"),
    "bounded": lambda x: torch.tanh(x) + torch.sigmoid(x) + x.clamp(-1, 1) * x.abs() + x.relu(),
    "choice": lambda x: torch.where(x > 0.3, x**3, -x) + torch.maximum(x, x * x) - torch.minimum(x, 2 * x),
    "detached": lambda x: x * x.detach() + (x.clamp(-1, 1) - x).detach(),
    "flat": lambda x: torch.floor(x) + (x > 0).float() + x.detach() * 0,
}


@pytest.mark.parametrize("name", [x for x in ONE if x != "flat"])
def test_derivatives_are_autograds(name: str) -> None:
    """The program and its derivative, run line by line with torch, against autograd in float64."""
    program = new_program()
    x = program.symbol("x", torch.float64)
    y = ONE[name](x)  # type: ignore[arg-type]
    slope = derivative(program, y, x)  # type: ignore[arg-type]
    for value in (-1.7, -0.4, 0.2, 0.9, 2.3):
        leaf = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        known = _run(program, {"x": leaf.detach()})
        wanted = ONE[name](leaf)
        torch.testing.assert_close(known[y.name], wanted.detach(), rtol=1e-12, atol=1e-12)  # type: ignore[attr-defined]
        grad = torch.autograd.grad(wanted, leaf)[0]
        torch.testing.assert_close(known[slope.name], grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fn", [torch.relu, lambda x: x.clamp(0, 1), lambda x: torch.maximum(x, x * 0)])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_slopes_at_a_tie_are_torchs(fn: Callable[[Tensor], Tensor], value: float) -> None:
    """Where a model starts from zeros, every score is one."""
    program = new_program()
    x = program.symbol("x", torch.float64)
    slope = derivative(program, fn(x), x)  # type: ignore[arg-type]
    leaf = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    known = _run(program, {"x": leaf.detach()})
    assert float(known[slope.name]) == float(torch.autograd.grad(fn(leaf), leaf)[0])


def test_sums_of_bools_are_bools() -> None:
    """Of a GPU's single bits, a sum would carry over."""
    program = new_program()
    q, kv = program.symbol("q", torch.int32), program.symbol("kv", torch.int32)
    _ = ((q > kv) + (kv == 0)) * (q != 2)
    assert [line.op for line in program.lines] == ["gt", "eq", "or", "ne", "and"]
    with pytest.raises(NotImplementedError, match="sub on bools"):
        _ = (q > kv) - (kv == 0)


def test_a_dtype_is_found_behind_a_device() -> None:
    program = new_program()
    x = program.symbol("x", torch.float32)
    assert x.to("cpu", torch.int32).dtype == torch.int32
    with pytest.raises(NotImplementedError, match="by a string"):
        x.type("torch.IntTensor")


def _run(program: Program, known: dict[str, Tensor]) -> dict[str, Tensor]:
    torch_names = {"div": "true_divide", "and": "bitwise_and", "or": "bitwise_or", "not": "logical_not"}
    torch_names |= {"clamp_min": "maximum", "clamp_max": "minimum", "relu": "maximum"}
    for line in program.lines:
        args = [known[x.name] if hasattr(x, "name") else torch.as_tensor(x, dtype=torch.float64) for x in line.args]
        if line.op == "where":
            made = torch.where(*args)
        elif line.op == "to":
            made = args[0].to(line.result.dtype)
        else:
            made = getattr(torch, torch_names.get(line.op, line.op))(*args)
        known[line.result.name] = made
    return known


def test_what_does_not_depend_has_no_slope() -> None:
    program = new_program()
    x, y = program.symbol("x", torch.float32), program.symbol("y", torch.float32)
    assert derivative(program, torch.floor(x) + y, x) == 0.0  # type: ignore[arg-type]


def _branch(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return kv <= q if h == 0 else kv >= q


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "branch": (_branch, "decides by a value"),
    "a row": (lambda b, h, q, kv: (TABLE[h] > 0) & (kv < q), "Rows"),
    "sorting": (lambda b, h, q, kv: torch.sort(kv) > q, "sort"),
    "power": (lambda b, h, q, kv: q**kv > 3, "power"),
    "a float index": (lambda b, h, q, kv: TABLE[h, q / 2] > 0, "index is torch.float32"),
    "no number": (lambda b, h, q, kv: TABLE > 0, "does not return one number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name: str) -> None:
    fn, why = REFUSED[name]
    found = objection(functions(fj.Causal() & fj.MaskMod(fn), None), CPU, False, LANGUAGES)
    assert found is not None
    assert why in found
    assert "cannot be made part of its kernels" in found


def test_functions_elsewhere_or_traced_are_refused() -> None:
    mask = fj.Causal() | ~fj.MaskMod(lambda b, h, q, kv: TABLE[h, kv % 4] > 0)
    assert objection(functions(mask, None), CPU, False, LANGUAGES) is None
    assert "reads a tensor on cpu" in str(objection(functions(mask, None), torch.device("meta"), False, LANGUAGES))
    assert "while a graph is being traced" in str(objection(functions(mask, None), CPU, True, LANGUAGES))
    assert has_functions(fj.PerHead([fj.Full(), mask]), None)
    assert has_functions(fj.Full(), fj.SoftCap(2.0) >> fj.ScoreMod(lambda s, b, h, q, kv: s))
    assert not has_functions(fj.Causal() & fj.Prefix(2), fj.SoftCap(2.0))


@node
class Own(fj.Mask):
    """A user's mask that cannot be printed."""


@mask_case.register(Own)
def _(mask: Own, tables: RowTables, layout: Layout) -> Callable[..., Tensor]:
    return lambda b, h, q, kv: q > kv if tables.q_pos[q] else kv > q


@node
class OwnNormalizer(Pointwise):
    """A user's normalizer."""

    scale: float = 1.0


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"device": "cuda", "dtype": torch.bfloat16}
    for normalizer in (SiLU(), Sigmoid(), fj.StickBreaking(), fj.Softmax()):
        what = case(normalizer=normalizer, score=fj.SoftCap(2.0), **gpu)
        assert choose(what)[0] == "triton"
        assert refusal("triton", what) is None
    refused = [
        (case(normalizer=OwnNormalizer(), **gpu), "no kernels for the normalizer"),
        (case(normalizer=SiLU(), device="cuda", dtype=torch.float64), "not torch.float64"),
        (case(normalizer=SiLU(), dims=(2, 2, 16, 512), **gpu), "at most 256"),
        (case(Own(), normalizer=SiLU(), **gpu), "Own cannot be made part of its kernels: it decides by a value"),
        (case(fj.MaskMod(_branch), normalizer=SiLU(), **gpu), "_branch cannot"),
    ]
    for what, why in refused:
        assert why in str(refusal("triton", what))
        assert choose(what)[0] != "triton"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert refusal("triton", case(normalizer=SiLU(), dtype=torch.float32)) == "its kernels run on CUDA only"
    q, k, v = make_qkv([3], dtype=torch.float32)
    with pytest.raises(BackendError, match="'triton' cannot run this plan: its kernels run on CUDA only"):
        fj.attention(q, k, v, normalizer=SiLU(), backend="triton")
