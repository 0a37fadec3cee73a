"""Structures of plans for the backend ``cpp``, each compiled once, and the batches that all of them are run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import flexjag as fj
from flexjag.algebra.normalizers import Normalizer
from flexjag.testing import assert_matches_reference

F32, F64 = torch.float32, torch.float64
QUERIES = (0, 1, 7, 15, 16, 17, 23, 24, 25, 47, 48, 49, 97)
"""Lengths around the vectors and the blocks of queries, of 16 and 48 in float32 and 8 and 24 in float64."""
KEYS = (0, 1, 3, 4, 5, 7, 8, 9, 17, 48, 95, 96, 97, 193)
"""Lengths around the tiles of 4 or 8 keys, and the blocks of 96."""


@dataclass(frozen=True)
class Shape:
    """A batch: lengths, heads, groups, the place of q, k and v in memory, and a seed."""

    q_lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    heads: int = 2
    groups: int = 2
    memory: str = "contiguous"
    seed: int = 0


SHAPES = (
    Shape((*QUERIES, 0), (*QUERIES, 0), 4, 2),
    Shape(QUERIES, KEYS[1:], 4, 1, "heads first"),
    Shape((1, 1, 0, 1), (193, 0, 97, 5), 4, 4, "packed"),
    Shape((48, 3, 0), (1, 0, 96), 4, 2, "expanded"),
    Shape((0, 5), (9, 0), 4, 4),
    Shape((24, 16), (8, 4), 4, 2, "rows apart"),
)
"""All edges, in a few batches of 4 heads."""


def _memory(how: str, values: Tensor) -> Tensor:
    """The same values elsewhere in memory; `packed` and `rows apart` end with the last row."""
    total, heads, columns = values.shape
    if how == "heads first":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "columns first":
        return values.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    if how == "expanded":  # the heads of a token are one
        return values[:, :1].expand(-1, heads, -1)
    if how == "rows apart":
        return torch.cat([values.new_full((total, 3 * heads * columns), torch.nan), values.flatten(1)], 1)[
            :, -heads * columns :
        ].view(total, heads, columns)
    return values


def batches(shape: Shape, dtype: torch.dtype, dim: int, value_dim: int) -> tuple[fj.Jagged, fj.Jagged, fj.Jagged]:
    """Random q, k and v; they share one tensor if they are `packed` and of one shape."""
    g = torch.Generator().manual_seed(shape.seed)
    q_offsets, kv_offsets = (torch.tensor([0, *x]).cumsum(0) for x in (shape.q_lengths, shape.kv_lengths))
    kv_offsets = q_offsets if shape.q_lengths == shape.kv_lengths else kv_offsets
    sizes = [(int(q_offsets[-1]), shape.heads, dim)]
    sizes += [(int(kv_offsets[-1]), shape.groups, columns) for columns in (dim, value_dim)]
    values = [torch.randn(size, generator=g, dtype=F64).to(dtype) for size in sizes]
    if shape.memory == "packed" and sizes[0][0] == sizes[1][0]:
        ends = [x.shape[1] * x.shape[2] for x in values]
        parts = torch.cat([x.flatten(1) for x in values], 1).split(ends, 1)
        values = [part.unflatten(1, x.shape[1:]) for part, x in zip(parts, values, strict=True)]
    else:
        values = [_memory(shape.memory, x) for x in values]
    return fj.Jagged(values[0], q_offsets), fj.Jagged(values[1], kv_offsets), fj.Jagged(values[2], kv_offsets)


def numbers(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """Random numbers that need gradients."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).requires_grad_()


# Structures.

INTERVALS: dict[str, Callable[[Shape], fj.Mask]] = {
    "full": lambda x: fj.Full(),
    "causal": lambda x: fj.Causal(),
    "causal, end": lambda x: fj.Causal("end"),
    "sinks": lambda x: fj.Causal() & (fj.Window(9, 0) | fj.Prefix(2)),
    "window": lambda x: fj.Window(30, 5),
    "not": lambda x: ~fj.Window(8, 8) & ~fj.Prefix(1),
    "none": lambda x: ~fj.Full(),
    "per segment": lambda x: fj.Window(torch.arange(len(x.q_lengths)) * 3, 2),
    "per head": lambda x: fj.PerHead([fj.Causal(), fj.Window(5, 9), ~fj.Causal(), fj.Prefix(4)][: x.heads]),
    "rows": lambda x: fj.Rows(*_spans(x, 8)),
}
"""Masks that are exact spans: kernels evaluate no function of theirs, and are the same for all."""


def _spans(shape: Shape, count: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(shape.seed)
    lo = torch.randint(-3, 190, (count, sum(shape.q_lengths)), generator=g)
    return lo, lo + torch.randint(0, 9, lo.shape, generator=g)


def _opaque(x: Shape) -> fj.Mask:
    """A mask per head: many spans, groups, tables, and a function with tensors of its own."""
    g = torch.Generator().manual_seed(x.seed)
    q_ids, kv_ids = (torch.randint(-1, 3, (sum(n),), generator=g) for n in (x.q_lengths, x.kv_lengths))
    tables = [torch.rand(n, w, generator=g) < 0.5 for n, w in zip(x.q_lengths, x.kv_lengths, strict=True)]
    keep, starts = torch.rand(sum(x.kv_lengths) + 1, generator=g) < 0.7, torch.tensor([0, *x.kv_lengths]).cumsum(0)
    function = fj.MaskMod(lambda b, h, i, j: keep[starts[b] + j] & ((i + j) % 3 <= h % 3))
    masks = [~fj.Rows(*_spans(x, 20)), fj.SameGroup(q_ids, kv_ids), ~fj.Dense.from_list(tables), function]
    return fj.PerHead(masks)


def _all_scores(x: Shape, dtype: torch.dtype = F32) -> fj.Score:
    """Everything that learns, from tables that are contiguous, transposed, expanded and cut."""
    q_times, kv_times = (torch.arange(sum(n)) ** 2 % 311 for n in (x.q_lengths, x.kv_lengths))
    weights = numbers(3, 2 * x.heads, dtype=dtype)[1, ::2]

    def own(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s * weights[h] + weights[0] * torch.tanh(s) * ((i - j) % 3)

    buckets = fj.BucketedBias(numbers(1, 4, dtype=dtype).expand(x.heads, 4), torch.tensor([-20, 0, 20]))
    times = fj.TimeBias(numbers(5, x.heads, dtype=dtype).t(), q_times, torch.tensor([1, 5, 30, 100]), kv_times)
    start = fj.Alibi(numbers(x.heads, dtype=dtype)) >> fj.SoftCap(2.0)
    return start >> fj.RelativeBias(numbers(x.heads, 9, dtype=dtype)) >> buckets >> times >> fj.ScoreMod(own)


def _steep(x: Shape) -> fj.Score:
    """A function whose value and slope at a product of 0, which lanes without a query have, are infinite."""
    table = numbers(x.heads)
    return fj.ScoreMod(lambda s, b, h, i, j: table[h] * torch.rsqrt(torch.abs(s)).clamp(max=3) + torch.log(s * s))


def _ruled_out(x: Shape) -> fj.Score:
    """Scores of -inf: whole rows and columns of them."""
    table = numbers(x.heads)
    return fj.ScoreMod(lambda s, b, h, i, j: torch.where((i % 4 == 1) | (j % 5 == 2), -torch.inf, s * table[h]))


@dataclass(frozen=True)
class Structure:
    """What is compiled: dtype, D, E, and functions of a shape that give mask, score and normalizer."""

    dtype: torch.dtype = F32
    dim: int = 8
    value_dim: int = 8
    masks: tuple[str, ...] = ("causal",)
    score: Callable[[Shape], fj.Score | None] = lambda x: None
    normalizer: Callable[[Shape], Normalizer] = lambda x: fj.Softmax()

    def mask(self, name: str, shape: Shape) -> fj.Mask:
        return _opaque(shape) if name == "opaque" else INTERVALS[name](shape)

    def check(self, shape: Shape, mask: str, backend: str = "cpp") -> None:
        """Compare with the reference, forward and backward."""
        q, k, v = batches(shape, self.dtype, self.dim, self.value_dim)
        parts = {"mask": self.mask(mask, shape), "score": self.score(shape), "normalizer": self.normalizer(shape)}
        assert_matches_reference(q, k, v, plan=fj.plan(q, k, block_size=16, **parts), backend=backend)


ALL = tuple(INTERVALS)
STRUCTURES: dict[str, Structure] = {
    "float32": Structure(F32, 16, 16, ALL),
    "float64": Structure(F64, 5, 3, ALL),
    "bfloat16": Structure(torch.bfloat16, 24, 40, ALL),
    "float16": Structure(torch.float16, 7, 9, ALL),
    "one column": Structure(F32, 1, 1, ALL),
    "a column over two vectors": Structure(F32, 33, 65, ("causal", "sinks", "not")),
    "many columns": Structure(F32, 257, 130, ("causal", "window")),
    "opaque": Structure(masks=("opaque",)),
    "scores": Structure(masks=("full", "sinks", "per head"), score=_all_scores),
    "scores, float64": Structure(F64, masks=("sinks",), score=_all_scores),
    "scores, bfloat16": Structure(
        torch.bfloat16, masks=("sinks",), score=lambda x: _all_scores(x, torch.bfloat16), normalizer=lambda x: fj.SiLU()
    ),
    "steep": Structure(masks=("full", "causal", "none"), score=_steep),
    "ruled out": Structure(masks=("full", "causal"), score=_ruled_out),
    "silu": Structure(
        masks=("full", "sinks", "none"), score=_ruled_out,
        normalizer=lambda x: fj.SiLU(torch.linspace(0.5, 2, sum(x.q_lengths)).requires_grad_()),
    ),
    "gelu": Structure(F64, masks=ALL, normalizer=lambda x: fj.GELU(0.25)),
    "sigmoid": Structure(masks=("opaque",), normalizer=lambda x: fj.Sigmoid(numbers(x.heads), 0.5)),
}  # fmt: skip


def run_all(names: tuple[str, ...] = tuple(STRUCTURES)) -> int:
    """Compare every structure on every shape with the reference; how many there were."""
    torch.set_num_threads(1)
    count = 0
    for name in names:
        structure = STRUCTURES[name]
        for shape in SHAPES:
            for mask in structure.masks:
                structure.check(shape, mask)
                count += 1
        print(name, flush=True)
    return count
