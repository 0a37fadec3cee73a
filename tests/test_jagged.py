"""Jagged: conversions, pytree, tracing, autograd, arithmetic."""

from __future__ import annotations

import dataclasses
import io
import operator
import pickle

import pytest
import torch
from cases import EDGE_LENGTHS, jagged
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

import flexjag as fj
from flexjag.errors import LayoutError, ShapeError

LENGTHS = pytest.mark.parametrize("lengths", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS.keys())


@LENGTHS
def test_lengths_round_trip(lengths: list[int]) -> None:
    x = fj.Jagged.from_lengths(torch.arange(sum(lengths)), lengths)
    assert x.lengths.tolist() == lengths
    assert x.num_segments == len(lengths)
    assert x.offsets.tolist() == [sum(lengths[:s]) for s in range(len(lengths) + 1)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_may_be_a_tensor_and_keep_their_dtype(dtype: torch.dtype) -> None:
    x = fj.Jagged.from_lengths(torch.arange(5), torch.tensor([2, 0, 3], dtype=dtype))
    assert x.offsets.dtype == dtype
    assert x.offsets.tolist() == [0, 2, 2, 5]


@LENGTHS
def test_list_round_trip(lengths: list[int]) -> None:
    pieces = [torch.full((n, 2), float(s)) for s, n in enumerate(lengths)]
    x = fj.Jagged.from_list(pieces)
    got = x.to_list()
    assert len(got) == len(pieces)
    assert all(torch.equal(a, b) for a, b in zip(got, pieces, strict=True))


def test_list_is_views_of_values() -> None:
    x = jagged([2, 3], 4)
    x.to_list()[1][0] = 7.0
    assert (x.values[2] == 7.0).all()


def test_empty_list_is_a_batch_of_no_segments() -> None:
    x = fj.Jagged.from_list([])
    assert (x.num_segments, x.values.shape[0], x.to_list()) == (0, 0, [])


@LENGTHS
@pytest.mark.parametrize("spare", [0, 3])
def test_padded_round_trip(lengths: list[int], spare: int) -> None:
    x = jagged(lengths, 3)
    longest = max(lengths, default=0) + spare
    dense = x.to_padded(fill=-9.0, max_length=longest)
    assert dense.shape == (len(lengths), longest, 3)
    for s, n in enumerate(lengths):
        assert torch.equal(dense[s, :n], x.to_list()[s])
        assert (dense[s, n:] == -9.0).all()
    back = fj.Jagged.from_padded(dense, lengths)
    assert torch.equal(back.values, x.values)
    assert torch.equal(back.offsets, x.offsets)


def test_padded_default_length_is_the_longest() -> None:
    assert jagged([2, 5, 0], 3).to_padded().shape == (3, 5, 3)
    assert fj.Jagged.from_list([]).to_padded().shape == (0, 0)


def test_padded_cuts_long_segments() -> None:
    x = fj.Jagged.from_lengths(torch.arange(1, 7), [1, 4, 1])
    assert x.to_padded(fill=0, max_length=2).tolist() == [[1, 0], [2, 3], [6, 0]]
    assert x.to_padded(fill=0, max_length=0).shape == (3, 0)


def test_padded_ignores_spare_rows() -> None:
    x = fj.Jagged(torch.arange(1, 6), torch.tensor([0, 1, 3]))
    assert x.to_padded(fill=0, max_length=2).tolist() == [[1, 0], [2, 3]]


def test_pytree() -> None:
    x = jagged([2, 0, 1], 3)
    leaves, spec = pytree.tree_flatten(x)
    assert [id(t) for t in leaves] == [id(x.values), id(x.offsets)]
    back = pytree.tree_unflatten(leaves, spec)
    assert back.values is x.values
    assert back.offsets is x.offsets
    doubled = pytree.tree_map(lambda t: t * 2, {"x": x})["x"]
    assert torch.equal(doubled.values, x.values * 2)
    shapes = pytree.tree_map(lambda t: t.shape, x)  # leaves that are no tensors
    assert shapes.values == (3, 3)


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        jagged([1], 2).values = torch.zeros(1)  # type: ignore[misc]


def test_repr() -> None:
    x = fj.Jagged.from_lengths(torch.zeros(8, 2, 16, dtype=torch.bfloat16), [3, 0, 5])
    assert repr(x) == "Jagged(segments=3, tokens=8, values=[8, 2, 16] bfloat16, device=cpu)"
    assert repr(fj.Jagged.from_list([])) == "Jagged(segments=0, tokens=0, values=[0] float32, device=cpu)"


def test_through_compile() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def double_and_add(x: fj.Jagged, y: fj.Jagged) -> tuple[fj.Jagged, torch.Tensor]:
        z = x.with_values(x.values * 2) + x.with_values(y.values)
        return z, z.to_padded(max_length=4)

    for lengths in ([3, 1], [4, 0, 2, 1], [2]):
        x, y = jagged(lengths, 2, seed=1), jagged(lengths, 2, seed=2)
        out, dense = double_and_add(x, y)
        assert isinstance(out, fj.Jagged)
        torch.testing.assert_close(out.values, 2 * x.values + y.values, rtol=0, atol=0)
        torch.testing.assert_close(dense, out.to_padded(max_length=4), rtol=0, atol=0)


def test_construction_through_compile() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def repack(values: torch.Tensor, lengths: torch.Tensor) -> fj.Jagged:
        x = fj.Jagged.from_lengths(values, lengths)
        return fj.Jagged.from_padded(x.to_padded(max_length=5), lengths, total=values.shape[0])

    x = jagged([3, 0, 5], 2)
    out = repack(x.values, x.lengths)
    assert torch.equal(out.values, x.values)
    assert torch.equal(out.offsets, x.offsets)


def test_gradients() -> None:
    values = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)

    def through(values: torch.Tensor) -> torch.Tensor:
        x = fj.Jagged.from_lengths(values, [2, 0, 4])
        back = fj.Jagged.from_padded((x * x + 1.0).to_padded(), [2, 0, 4])
        return torch.cat(fj.Jagged.from_list(back.to_list()).to_list())

    assert torch.autograd.gradcheck(through, (values,))


def test_gradient_of_what_padding_cut_is_zero() -> None:
    values = torch.ones(5, requires_grad=True)
    fj.Jagged.from_lengths(values, [4, 1]).to_padded(max_length=2).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1, 1, 0, 0, 1]


@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.mul, operator.truediv])
def test_arithmetic(op) -> None:  # type: ignore[no-untyped-def]
    x, y = jagged([2, 0, 3], 4, seed=1), jagged([2, 0, 3], 4, seed=2)  # equal offsets in two tensors
    assert torch.equal(op(x, y).values, op(x.values, y.values))
    assert torch.equal(op(x, 3.0).values, op(x.values, 3.0))
    assert torch.equal(op(3.0, x).values, op(3.0, x.values))
    assert op(x, y).offsets is x.offsets


def test_negation() -> None:
    x = jagged([2, 1])
    assert torch.equal((-x).values, -x.values)


@pytest.mark.parametrize("other", [[3, 2], [2, 2], [2, 3, 0]])
def test_arithmetic_between_other_layouts_raises(other: list[int]) -> None:
    with pytest.raises(LayoutError, match=r"other: must have the same offsets.*wanted=Jagged.*other=Jagged"):
        jagged([2, 3]) + jagged(other)


def test_result_that_loses_tokens_raises() -> None:
    with pytest.raises(ShapeError, match=r"values: must keep the number of tokens; got shape=\(4,\), tokens=3"):
        jagged([2, 1]).with_values(torch.zeros(4))
    with pytest.raises(ShapeError, match="values: must keep the number of tokens"):
        jagged([1]).map(lambda v: v.repeat(2))


@pytest.mark.parametrize("swap", [False, True])
def test_arithmetic_with_a_tensor_says_what_to_do(swap: bool) -> None:
    x, row = jagged([2, 1], 4), torch.ones(4)
    with pytest.raises(ShapeError, match=r"other: must be a Jagged or a number; use x\.map.*shape=\(4,\)"):
        row + x if swap else x + row


def test_coordinates_and_moves() -> None:
    x = jagged([2, 0, 3], 4)
    assert x.positions.tolist() == [0, 1, 0, 1, 2]
    assert x.segment_ids.tolist() == [0, 0, 2, 2, 2]
    moved = x.to("meta")
    assert moved.device.type == moved.offsets.device.type == "meta"
    half = x.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.offsets is x.offsets
    assert torch.equal(x.map(lambda v: v + 1).values, x.values + 1)


def test_validate_returns_the_batch() -> None:
    x = jagged([1, 2])
    assert x.validate() is x


def test_keys_of_the_pytree() -> None:
    leaves, _ = pytree.tree_flatten_with_path({"x": jagged([1], 2)})
    assert [pytree.keystr(path) for path, _ in leaves] == ["['x'].values", "['x'].offsets"]


def test_torch_load_takes_it_by_default() -> None:
    x = jagged([2, 0, 1], 3)
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    back = torch.load(file)["x"]
    assert torch.equal(back.values, x.values)
    assert torch.equal(back.offsets, x.offsets)
    assert torch.equal(pickle.loads(pickle.dumps(x)).values, x.values)


@LENGTHS
def test_a_sequence_of_segments(lengths: list[int]) -> None:
    x = jagged(lengths, 3)
    pieces = x.to_list()
    assert x  # as it was before it had a length: `x or other` keeps an empty batch
    assert len(x) == len(pieces) == len(lengths)
    for i in range(-len(lengths), len(lengths)):
        assert torch.equal(x[i], pieces[i])
    assert all(torch.equal(a, b) for a, b in zip(x, pieces, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(x.unbind(), pieces, strict=True))
    for index in (
        slice(None),
        slice(1, 3),
        slice(-2, None),
        slice(3, 1),
        slice(9, 20),
        slice(None, None, 2),
        slice(None, None, -1),
    ):
        part = x[index].validate()
        assert part.values.shape[1:] == x.values.shape[1:]
        assert part.offsets.dtype == x.offsets.dtype
        assert part.lengths.tolist() == lengths[index]
        assert all(torch.equal(a, b) for a, b in zip(part, pieces[index], strict=True))


def test_segments_and_slices_are_views() -> None:
    x = fj.Jagged(torch.zeros(6), torch.tensor([0, 2, 2, 6], dtype=torch.int32))
    x[2][0] = 5.0
    x[1:].values[1] = 6.0
    assert x.values.tolist() == [0, 0, 5, 6, 0, 0]
    assert x[::2].offsets.dtype == torch.int32


def test_gradients_through_segments() -> None:
    x = jagged([2, 0, 3], 2).requires_grad_()
    weights = [1.0, 2.0, 3.0]
    for pieces in (x.unbind(), list(x), [x[i] for i in range(3)], x[::-1][::-1].to_list()):
        (got,) = torch.autograd.grad(sum(w * t.sum() for w, t in zip(weights, pieces, strict=True)), x.values)
        assert got[:, 0].tolist() == [1, 1, 3, 3, 3]


def test_concatenation_of_batches() -> None:
    batches = [jagged(n, 2, seed=i) for i, n in enumerate(([2, 0], [], [3], [0, 1]))]
    out = fj.Jagged.concat(batches)
    assert out.lengths.tolist() == [2, 0, 3, 0, 1]
    assert all(torch.equal(a, b) for a, b in zip(out, [t for x in batches for t in x], strict=True))


def test_a_data_loader_joins_batches() -> None:
    samples = [{"x": jagged([n, 1], 2), "y": n} for n in (1, 2, 3)]
    (batch,) = DataLoader(samples, batch_size=3)  # type: ignore[arg-type]
    assert batch["x"].lengths.tolist() == [1, 1, 2, 1, 3, 1]
    assert batch["y"].tolist() == [1, 2, 3]


def test_copies_and_moves() -> None:
    x = jagged([2, 0, 3], 4).requires_grad_()
    copy, cut = x.clone(), x.detach()
    assert copy.values.grad_fn is not None
    assert copy.values.data_ptr() != x.values.data_ptr()
    assert copy.offsets.data_ptr() != x.offsets.data_ptr()
    assert not cut.values.requires_grad
    assert cut.values.data_ptr() == x.values.data_ptr()
    assert x.cpu().values is x.values
    wide = fj.Jagged(torch.zeros(4, 6)[:, ::2], torch.tensor([0, 9, 4])[::2])
    assert not wide.values.is_contiguous()
    packed = wide.contiguous()
    assert packed.values.is_contiguous()
    assert packed.offsets.is_contiguous()
    assert packed.offsets.tolist() == [0, 4]


@pytest.mark.parametrize("arguments", [((torch.float32, True, True), {}), ((torch.float64,), {"copy": True})])
def test_flags_of_moves_reach_the_offsets(arguments: tuple[tuple, dict]) -> None:
    x = jagged([2, 0, 3], 4)
    args, kwargs = arguments
    moved = x.to(*args, **kwargs)
    assert moved.dtype == args[0]
    assert moved.offsets.data_ptr() != x.offsets.data_ptr()


def test_pinning_pins_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)  # real pinning needs a GPU
    x = fj.Jagged(torch.zeros(2), torch.tensor([0, 2]))
    pinned = pin_memory({"x": x})["x"]
    assert pinned.values.tolist() == [1, 1]
    assert pinned.offsets.tolist() == [1, 3]


def attend(x: fj.Jagged) -> fj.Jagged:
    return fj.attention(x, x, x, mask=fj.Causal(), backend="segments")  # auto may take another without gradients


def test_checkpointing_takes_batches_only_without_reentrance() -> None:
    """What the README says."""
    x = jagged([2, 0, 3], 1, 16).requires_grad_()
    (want,) = torch.autograd.grad(attend(x).values.pow(2).sum(), x.values)
    out = checkpoint(attend, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.values.pow(2).sum(), x.values)[0], want)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        assert not checkpoint(attend, x, use_reentrant=True).values.requires_grad
    tensors = checkpoint(lambda v, o: attend(fj.Jagged(v, o)).values, x.values, x.offsets, use_reentrant=True)
    tensors.pow(2).sum().backward()
    assert torch.equal(x.values.grad, want)


def test_hooks_see_tensors_only() -> None:
    """What the README says."""

    class Layer(nn.Module):
        def forward(self, x: fj.Jagged) -> fj.Jagged:
            return x * 2.0

    seen: list[str] = []
    layer, x = Layer(), jagged([2, 1], 2).requires_grad_()
    layer.register_full_backward_hook(lambda *_: seen.append("module"))
    layer.register_forward_hook(
        lambda module, args, out: out.values.register_hook(lambda grad: seen.append("values")) and None
    )
    with pytest.warns(UserWarning, match="For backward hooks to be called"):
        out = layer(x)
    out.values.sum().backward()
    assert seen == ["values"]
