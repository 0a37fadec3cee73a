"""Rotary positions against complex numbers in float64, formulas written out per pair, and transformers' own tables."""

from __future__ import annotations

import cmath
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from cases import EDGE_LENGTHS, jagged
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flexjag as fj
from flexjag.algebra.positions import NTK, Linear, Llama3, Scaling, YaRN
from flexjag.errors import LayoutError, PositionError, ShapeError
from flexjag.testing import assert_compiles, lengths

NO_LENGTHS = torch.zeros(1, dtype=torch.int64)
SCALINGS: dict[str, Scaling | None] = {
    "none": None,
    "linear": Linear(4.0),
    "ntk": NTK(8.0),
    "dynamic": NTK(2.0, 5),
    "yarn": YaRN(4.0, 64),
    "yarn, deepseek": YaRN(40.0, 4096, fast=16.0, slow=2.0, magnitudes=(0.7, 1.0), truncate=False),
    "yarn, given": YaRN(4.0, 64, attention_factor=1.3),
    "llama3": Llama3(8.0, 256),
}


def frequency(scaling: Scaling | None, theta: float, dim: int, i: int, length: float) -> float:
    """The angle per position of pair i, from the papers' formulas, in Python's floats."""
    plain = theta ** (-2 * i / dim)
    match scaling:
        case None:
            return plain
        case Linear():
            return plain / scaling.factor
        case NTK():
            factor = scaling.factor
            if scaling.original_length is not None:
                factor = max(1.0, factor * length / scaling.original_length - (factor - 1))
            return (theta * factor ** (dim / (dim - 2))) ** (-2 * i / dim)
        case YaRN():
            ends = [
                dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
                for turns in (scaling.fast, scaling.slow)
            ]
            if scaling.truncate:
                ends = [math.floor(ends[0]), math.ceil(ends[1])]
            low, high = max(ends[0], 0), min(ends[1], dim - 1)
            ramp = (i - low) / ((high - low) or 0.001)
            interpolated = min(max(ramp, 0.0), 1.0)
            return plain * (1 - interpolated) + plain / scaling.factor * interpolated
        case Llama3():
            wavelength = 2 * math.pi / plain
            if wavelength < scaling.original_length / scaling.fast:
                return plain
            if wavelength > scaling.original_length / scaling.slow:
                return plain / scaling.factor
            kept = (scaling.original_length / wavelength - scaling.slow) / (scaling.fast - scaling.slow)
            return plain * kept + plain / scaling.factor * (1 - kept)
    raise AssertionError(scaling)


def magnitude(scaling: Scaling | None) -> float:
    if not isinstance(scaling, YaRN):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.magnitudes is not None:
        above, below = (0.1 * x * math.log(scaling.factor) + 1 for x in scaling.magnitudes)
        return above / below
    return 0.1 * math.log(scaling.factor) + 1


def rotated(x: Tensor, at: list[float], dim: int, scaling: Scaling | None, theta: float, interleaved: bool) -> Tensor:
    """One segment ``[n, H, D]`` with every pair of its first `dim` dimensions turned as a complex number."""
    out, n = x.clone(), x.shape[0]
    length = max(at, default=0.0) + 1
    for i in range(dim // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
        each = frequency(scaling, theta, dim, i, length)
        turn = torch.tensor([magnitude(scaling) * cmath.exp(1j * p * each) for p in at], dtype=torch.complex128)
        z = torch.complex(x[..., a], x[..., b]) * turn.reshape(n, *[1] * (x.ndim - 2))
        out[..., a], out[..., b] = z.real, z.imag
    return out


def wanted(x: fj.Jagged, starts: list[int], dim: int, **how: Any) -> Tensor:
    parts = [rotated(s, [f + i for i in range(len(s))], dim, **how) for s, f in zip(x.to_list(), starts, strict=True)]
    return torch.cat([*parts, x.values[:0]])


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("kind", SCALINGS)
@given(data=st.data())
def test_pairs_turn_as_complex_numbers(kind: str, interleaved: bool, data: st.DataObject) -> None:
    each = data.draw(lengths(max_total=60))
    dim, rotary = data.draw(st.sampled_from([(8, 8), (12, 4), (64, 32), (6, 6)]))
    heads = data.draw(st.integers(1, 3))
    starts = [data.draw(st.integers(0, 40)) for _ in each]
    theta = data.draw(st.sampled_from([10000.0, 500000.0, 100]))
    q, k = jagged(each, heads, dim), jagged(each, 1, dim, seed=1)
    how = {"scaling": SCALINGS[kind], "theta": theta, "interleaved": interleaved}
    new = fj.rope(q, k, rotary_dim=rotary, starts=torch.tensor(starts, dtype=torch.int64), **how)
    for x, y in zip((q, k), new, strict=True):
        assert y.offsets is x.offsets
        torch.testing.assert_close(y.values, wanted(x, starts, rotary, **how), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", SCALINGS)
def test_segments_are_rotated_as_if_alone(kind: str) -> None:
    x = jagged([3, 0, 9, 1], 2, 8, dtype=torch.float32)
    whole = fj.rope(x, scaling=SCALINGS[kind])
    for one, out in zip(x.to_list(), whole.to_list(), strict=True):
        assert torch.equal(fj.rope(fj.Jagged.from_list([one]), scaling=SCALINGS[kind]).values, out)


@pytest.mark.parametrize("kind", EDGE_LENGTHS)
def test_edges(kind: str) -> None:
    each = EDGE_LENGTHS[kind]
    x = jagged(each, 2, 4)
    torch.testing.assert_close(
        fj.rope(x, starts=7).values, wanted(x, [7] * len(each), 4, scaling=None, theta=1e4, interleaved=False)
    )


def test_a_decoding_step_is_the_last_row_of_the_whole() -> None:
    x = jagged([5, 1, 9], 2, 8)
    whole = fj.rope(x)
    last = [at - 1 for at in x.offsets[1:].tolist()]
    step = fj.rope(fj.Jagged.from_lengths(x.values[last], [1, 1, 1]), starts=x.lengths - 1)
    assert torch.equal(step.values, whole.values[last])


def test_scores_depend_on_the_distance_only() -> None:
    q, k = fj.rope(jagged([1] * 9, 1, 8), jagged([1] * 9, 1, 8, seed=1), starts=torch.arange(9))
    moved = fj.rope(jagged([1] * 9, 1, 8), jagged([1] * 9, 1, 8, seed=1), starts=torch.arange(9) + 50)
    torch.testing.assert_close(
        (q.values * k.values).sum(-1), (moved[0].values * moved[1].values).sum(-1), rtol=1e-12, atol=1e-12
    )


def test_axes_rotate_parts_of_their_own() -> None:
    """Each axis is a rotation of its own part: rows and columns of an image, in tokens of any order."""
    x = jagged([6, 4], 2, 12)
    at = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [0, 0], [0, 1], [1, 0], [1, 1]])
    for interleaved in (False, True):
        out = fj.rope(x, positions=at, rotary_dim=8, interleaved=interleaved)
        for axis in (0, 1):
            part = x.map(lambda v, axis=axis: v[..., 4 * axis : 4 * axis + 4])
            alone = fj.rope(part, positions=at[:, axis], interleaved=interleaved)
            assert torch.equal(out.values[..., 4 * axis : 4 * axis + 4], alone.values)
        assert torch.equal(out.values[..., 8:], x.values[..., 8:])


def test_positions_may_be_fractions_and_learn() -> None:
    x, at = jagged([4], 1, 4), torch.tensor([0.5, 1.25, 3.0, 0.125], dtype=torch.float64, requires_grad=True)
    out = fj.rope(x, positions=at)
    torch.testing.assert_close(out.values, rotated(x.values, at.tolist(), 4, None, 1e4, False))
    assert torch.autograd.gradcheck(lambda p: fj.rope(x, positions=p).values, at)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_angles_are_float32_whatever_the_dtype(dtype: torch.dtype) -> None:
    """Half precision would give position 1000 to the next 4 or 8: the result is rounded once instead."""
    x = jagged([3], 2, 64, dtype=dtype)
    out = fj.rope(x, starts=1000)
    exact = rotated(x.values.double(), [1000.0, 1001.0, 1002.0], 64, None, 1e4, False)
    assert out.dtype == dtype
    angle = 1002 * 2 * torch.finfo(torch.float32).eps  # of the frequency and of the product
    bound = torch.finfo(dtype).eps * exact.abs() / 2 + angle * x.values.double().abs().amax() * 2
    assert bool(((out.values.double() - exact).abs() <= bound + 1e-6).all())


def test_gradients() -> None:
    q, k = jagged([3, 0, 2], 2, 6), jagged([3, 0, 2], 1, 6, seed=1)

    def run(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        out = fj.rope(q.with_values(a), k.with_values(b), scaling=YaRN(4.0, 64), rotary_dim=4, interleaved=True)
        return out[0].values, out[1].values

    inputs = [x.values.requires_grad_() for x in (q, k)]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_spare_rows_may_hold_anything() -> None:
    values = jagged([9], 1, 4).values
    whole, clean = fj.Jagged(values.clone(), torch.tensor([0, 2, 6])), fj.Jagged(values[:6], torch.tensor([0, 2, 6]))
    whole.values[6:] = torch.nan
    for scaling in (None, NTK(2.0, 3)):
        out = fj.rope(whole, scaling=scaling, starts=torch.tensor([1, 4]))
        assert torch.equal(out.values[:6], fj.rope(clean, scaling=scaling, starts=torch.tensor([1, 4])).values)


def batches(*, with_starts: bool, positions: bool) -> list[tuple[Any, ...]]:
    found = []
    for each in ([5, 9, 13], [3, 4, 8], [20], [2, 2, 2, 2, 60]):
        q, k = jagged(each, 4, 8, dtype=torch.float32), jagged(each, 2, 8, dtype=torch.float32)
        extra: list[Tensor] = [torch.tensor(each)] if with_starts else []
        extra += [torch.randint(0, 50, (sum(each), 2))] if positions else []
        for x in extra:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        found.append((q.requires_grad_(), k.requires_grad_(), *extra))
    return found


COMPILED = {
    "plain": lambda q, k: fj.rope(q, k),
    "partial, interleaved": lambda q, k: fj.rope(q, k, interleaved=True, rotary_dim=4),
    "yarn": lambda q, k: fj.rope(q, k, scaling=YaRN(4.0, 64)),
    "starts": lambda q, k, starts: fj.rope(q, k, scaling=NTK(2.0, 5), starts=starts),
    "axes": lambda q, k, positions: fj.rope(q, k, positions=positions),
}


@pytest.mark.parametrize("kind", COMPILED)
def test_one_graph_for_all_batches(kind: str) -> None:
    """A single segment takes one graph more where the graph holds a tensor per segment, as everywhere."""
    fn, calls = COMPILED[kind], batches(with_starts=kind == "starts", positions=kind == "axes")

    def check(index: int, out: tuple[fj.Jagged, fj.Jagged]) -> None:
        for x, y in zip(out, fn(*calls[index]), strict=True):
            torch.testing.assert_close(x.values, y.values, rtol=1e-5, atol=1e-5)
        assert calls[index][0].values.grad is not None

    assert_compiles(fn, calls, after_each=check, max_graphs=1 + (kind == "starts"), backend="aot_eager")


def test_inductor_makes_one_rotation_of_angles_that_all_heads_share() -> None:
    from torch._inductor.utils import run_and_get_code

    q, k = (jagged([5, 9], heads, 16, dtype=torch.float32) for heads in (7, 3))
    torch._dynamo.reset()
    try:
        out, (code,) = run_and_get_code(torch.compile(COMPILED["plain"], fullgraph=True), q, k)
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(out[0].values, fj.rope(q, k)[0].values, rtol=1e-5, atol=1e-5)
    kernels = code.split("async_compile.cpp_pybinding")[1:]
    assert len(kernels) <= 5  # an assertion on the offsets, token indices, the table, and one each for q and k
    assert not any(f"static_cast<int64_t>({heads}L)" in x for x in kernels if ".cos()" in x for heads in (7, 3))


# ------------------------------------------------------------------------------------------- transformers' own tables

HUGGINGFACE: dict[str, tuple[Scaling, dict[str, Any]]] = {
    "linear": (Linear(4.0), {"rope_type": "linear", "factor": 4.0}),
    "dynamic": (NTK(2.0, 4096), {"rope_type": "dynamic", "factor": 2.0}),
    "yarn": (YaRN(4.0, 2048), {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}),
    "yarn, deepseek": (
        YaRN(40.0, 4096, fast=16.0, slow=2.0, magnitudes=(0.7, 1.0), truncate=False),
        {
            "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.7,
            "mscale_all_dim": 1.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False,
        },
    ),
    "llama3": (
        Llama3(8.0, 8192),
        {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("kind", HUGGINGFACE)
def test_transformers_tables(kind: str, theta: float) -> None:
    """Needs transformers, which no extra brings (it installs 160 MB): skipped where it is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils = pytest.importorskip("transformers.modeling_rope_utils")
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    scaling, parameters = HUGGINGFACE[kind]
    most = getattr(scaling, "original_length", None) if kind == "dynamic" else 131072
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, head_dim=64, max_position_embeddings=most or 2048,
        rope_parameters={"rope_theta": theta, **parameters},
    )  # fmt: skip
    length = 6000
    found, factor = utils.ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", length)
    ours = scaling.frequencies(theta, 64, torch.tensor([length]), torch.float32).reshape(-1)
    torch.testing.assert_close(ours, found, rtol=1e-6, atol=0)
    assert scaling.magnitude == pytest.approx(factor, rel=1e-12)

    x = jagged([length], 2, 64, dtype=torch.float32)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * found
    cos, sin = (f(torch.cat([angles, angles], 1))[None] * factor for f in (torch.cos, torch.sin))
    theirs, _ = apply_rotary_pos_emb(x.values.transpose(0, 1)[None], x.values.transpose(0, 1)[None], cos, sin)
    out = fj.rope(x, theta=theta, scaling=scaling).values
    slack = length * 2**-23 * 8 if kind == "yarn, deepseek" else 1e-6  # where a frequency differs by its last bit
    torch.testing.assert_close(out, theirs[0].transpose(0, 1), rtol=0, atol=slack)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"rotary_dim": 3}, ShapeError, "rotary_dim: must be even"),
        ({"rotary_dim": 10}, ShapeError, "at most D"),
        ({"theta": 0.0}, PositionError, "theta: must be a positive number; got theta=0.0"),
        ({"starts": -1}, PositionError, "starts: must be an int of 0 to 16777216.*starts=-1"),
        ({"starts": torch.tensor([0, -3])}, PositionError, "least=-3.0"),
        ({"starts": torch.tensor([0])}, ShapeError, r"integers \[S\]"),
        ({"starts": torch.tensor([0.0, 1.0])}, ShapeError, "dtype=torch.float32"),
        ({"positions": torch.arange(4)}, ShapeError, "tokens=5"),
        ({"positions": torch.tensor([0, 1, 2, 3, -1])}, PositionError, "least=-1.0"),
        ({"positions": torch.tensor([0, 1, 2, 3, 2**24 + 1])}, PositionError, "most=16777217.0"),
        ({"positions": torch.tensor([0.0, 1, 2, 3, torch.nan])}, PositionError, "most=nan"),
        ({"starts": [1, 2]}, PositionError, r"starts: must be an int of .* tensor or array \[S\].*starts=\[1, 2\]"),
        ({"scaling": 2.0}, PositionError, r"scaling: must be None or one of flexjag.positions.*scaling=2.0"),
        ({"scaling": {"rope_type": "yarn"}}, PositionError, "scaling: must be None or one of flexjag.positions"),
        ({"scaling": NTK}, PositionError, "scaling: must be None or one of flexjag.positions"),
        ({"positions": torch.zeros(5, 3)}, ShapeError, "must be a multiple of 6"),
        ({"positions": torch.zeros(5, 0)}, ShapeError, "must have an axis"),
        ({"positions": torch.arange(5), "starts": 3}, PositionError, "must not be given beside positions"),
        ({"positions": torch.arange(5), "scaling": NTK(2.0, 8)}, PositionError, "dynamic NTK"),
        ({"rotary_dim": 2, "scaling": NTK(2.0)}, PositionError, "at least 4"),
    ],
)
def test_bad_arguments(how: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        fj.rope(jagged([2, 3], 1, 8), **how)


def test_bad_inputs() -> None:
    x = jagged([2, 3], 1, 8)
    for k in (jagged([3, 2], 1, 8), jagged([2, 2], 1, 8), jagged([5], 1, 8)):
        with pytest.raises(LayoutError, match="a call of their own"):
            fj.rope(x, k)
    with pytest.raises(ShapeError, match="floating point"):
        fj.rope(x.to(torch.int64))
    with pytest.raises(ShapeError, match=r"must be a flexjag\.Jagged"):
        fj.rope(x.values)  # type: ignore[call-overload]
    with pytest.raises(ShapeError, match="k="):
        fj.rope(x, jagged([2, 3], 1, 6))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(0.5), lambda: Linear(math.nan), lambda: NTK(2.0, 0), lambda: YaRN(4.0, 0),
        lambda: YaRN(4.0, 64, fast=1.0, slow=2.0), lambda: YaRN(4.0, 64, attention_factor=-1.0),
        lambda: Llama3(8.0, 64, slow=4.0, fast=1.0),
    ],
)  # fmt: skip
def test_bad_scalings(make: Any) -> None:
    with pytest.raises(PositionError, match="must be"):
        make()


def test_numbers_of_numpy() -> None:
    x, starts, positions = jagged([2, 3], 1, 8), np.array([3, 7], dtype=np.int32), np.array([4, 2, 0, 1, 9])
    assert torch.equal(fj.rope(x, starts=starts).values, fj.rope(x, starts=torch.tensor([3, 7])).values)
    assert torch.equal(fj.rope(x, starts=np.int64(3)).values, fj.rope(x, starts=3).values)
    assert torch.equal(fj.rope(x, positions=positions).values, fj.rope(x, positions=torch.tensor(positions)).values)
