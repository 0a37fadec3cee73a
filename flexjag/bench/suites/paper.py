"""Suite ``paper``: the comparisons of Jagged Flash Attention (arXiv 2409.15373), with the ratios that it publishes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexjag import ops
from flexjag.api.attention import attention
from flexjag.api.plan import plan
from flexjag.bench.measuring.lengths import meta_lengths
from flexjag.bench.measuring.measure import Results, ratio
from flexjag.bench.measuring.padded import Expected, Padding, Tensors, with_gradients
from flexjag.bench.suites.registry import Arm, Case, CaseResult, Figure, Options, suite
from flexjag.jagged import Jagged

SPARSITIES = (0.1, 0.5, 0.95)
MIDDLE = 0.5
WIDTH = 64  # D
TARGETS = 16  # dense queries, or columns of the dense factor, of each segment

DENSE, UNFUSED, FLASH, OURS = "padded, unfused", "jagged, unfused", "padded, SDPA with a mask", "flexjag"
SELF, TARGET, MATMUL, SOFTMAX = "self-attention", "target attention", "matmul", "softmax"


@dataclass(frozen=True)
class Grid:
    """Number of segments B, and the padded lengths N, one case each."""

    segments: int
    lengths: tuple[int, ...]


QUICK_GRID = Grid(4, (32, 64, 96))
GRIDS = {"cpu": Grid(64, (128, 256, 512)), "cuda": Grid(256, (128, 256, 512, 1024, 2048))}


class PaperProblem:
    """One computation of the paper over one batch, forward and backward, and its arms.

    Padded arms have padded inputs, outputs and gradients: conversion between the layouts is not timed.

    Args:
        job: The computation: :data:`SELF`, :data:`TARGET`, :data:`MATMUL` or :data:`SOFTMAX`.
        grid: Gives the number of segments B; its lengths are not used.
        length: Padded length N.
        sparsity: Parameter s of Meta's length generator.
        options: Device and seed.
    """

    def __init__(self, job: str, grid: Grid, length: int, sparsity: float, options: Options) -> None:
        self.job, self.length, self.device = job, length, options.device
        self.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        self.lengths = batch_lengths(grid, length, sparsity, options)
        self.padding = Padding(self.lengths, options.device, length)
        self.generator = torch.Generator(options.device).manual_seed(options.seed)
        tokens, segments = sum(self.lengths), grid.segments
        packed = [self._draw(tokens, WIDTH) for _ in range(3)]
        dense = self._draw(segments, TARGETS, WIDTH)
        # For the result and each input, True if packed; the others have one entry per segment.
        self.leaves, self.is_packed = {
            SELF: (packed, (True,) * 4),
            TARGET: ([dense, *packed[:2]], (False, False, True, True)),
            MATMUL: ([packed[0], dense.transpose(1, 2).contiguous()], (True, True, False)),
            SOFTMAX: (packed[:1], (True, True)),
        }[job]
        shapes = {SELF: packed[0].shape, TARGET: dense.shape, MATMUL: (tokens, TARGETS), SOFTMAX: packed[0].shape}
        self.grad = self._draw(*shapes[job])
        names = ["output", *(f"gradient {i + 1}" for i in range(3))]
        self.expected = Expected(self._by_segment, self.dtype, names, terms=WIDTH)  # a score is a sum of D products

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def arms(self) -> list[Arm]:
        """The arms of this computation."""
        packed = {
            SELF: ((UNFUSED, self._jagged_self), (OURS, self._flexjag)),
            TARGET: ((UNFUSED, self._jagged_target), (OURS, _ours_target)),
            MATMUL: ((OURS, ops.jagged_dense_bmm),),
            SOFTMAX: ((OURS, ops.jagged_softmax),),
        }[self.job]
        padded = {
            SELF: ((DENSE, self._dense_attention), (FLASH, self._flash)),
            TARGET: ((DENSE, self._dense_attention), (FLASH, self._flash)),
            MATMUL: ((DENSE, torch.bmm),),
            SOFTMAX: ((DENSE, self._dense_softmax),),
        }[self.job]
        matrix = len(self.lengths) * self.length * (self.length if self.job == SELF else TARGETS)
        needs = 6 * matrix * self.grad.element_size()
        out = [Arm(name, partial(self._padded_call, run), self._check_padded, needs) for name, run in padded]
        out += [Arm(name, partial(self._packed_call, run), self.expected.check, needs) for name, run in packed]
        return sorted(out, key=lambda arm: (DENSE, UNFUSED, FLASH, OURS).index(arm.name))

    # Calls of the arms, with packed or padded inputs

    def _packed_call(self, run: Callable[..., Any]) -> Callable[[], Tensors]:
        """Forward and backward of `run`, whose packed inputs are Jagged."""
        leaves = [x.detach().requires_grad_() for x in self.leaves]
        first = Jagged.from_lengths(self.leaves[self.is_packed[1:].index(True)], self.lengths)
        inputs = [first.with_values(x) if p else x for x, p in zip(leaves, self.is_packed[1:], strict=True)]
        if self.job == SELF:
            run = run(first)

        def forward() -> Tensor:
            out = run(*inputs)
            return out.values if isinstance(out, Jagged) else out

        return with_gradients(forward, leaves, self.grad)

    def _padded_call(self, run: Callable[..., Tensor]) -> Callable[[], Tensors]:
        made = [self.padding.pad(x) if p else x.detach() for x, p in zip(self.leaves, self.is_packed[1:], strict=True)]
        grad = self.padding.pad(self.grad) if self.is_packed[0] else self.grad
        leaves = [x.requires_grad_() for x in made]
        keys = self.padding.real.clone()
        keys[:, 0] = True  # an empty segment attends its padding, so that it is not NaN
        mask = keys[:, None] if self.job in (SELF, TARGET) else keys[..., None]
        return with_gradients(lambda: run(*leaves) if run is torch.bmm else run(mask, *leaves), leaves, grad)

    def _check_padded(self, got: Tensors) -> str | None:
        return self.expected.check(
            tuple(self.padding.unpad(x) if p else x for x, p in zip(got, self.is_packed, strict=True))
        )

    # The arms' forwards

    def _flexjag(self, x: Jagged) -> Callable[..., Any]:
        made = plan(x.with_values(x.values[:, None]))

        def run(*qkv: Jagged) -> Tensor:
            out = attention(*(t.with_values(t.values[:, None]) for t in qkv), plan=made)  # one head
            assert isinstance(out, Jagged)
            return out.values[:, 0]

        return run

    def _jagged_self(self, x: Jagged) -> Callable[..., Any]:
        total = sum(n * n for n in self.lengths)

        def run(q: Jagged, k: Jagged, v: Jagged) -> Jagged:
            scores = ops.jagged_jagged_bmm_jagged_out(q.with_values(q.values * WIDTH**-0.5), k, total=total)
            return ops.array_jagged_bmm(ops.jagged2_softmax(scores, x.offsets), v)

        return run

    def _jagged_target(self, query: Tensor, key: Jagged, value: Jagged) -> Tensor:
        scores = ops.jagged_dense_bmm(key, query.transpose(1, 2) * WIDTH**-0.5)
        return ops.jagged_jagged_bmm(ops.jagged_softmax(scores), value)

    def _dense_attention(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * WIDTH**-0.5 @ k.transpose(1, 2)).masked_fill(~mask, -torch.inf)
        return torch.softmax(scores, 2) @ v

    def _flash(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask[:, None])[:, 0]

    def _dense_softmax(self, mask: Tensor, x: Tensor) -> Tensor:
        return torch.softmax(x.masked_fill(~mask, -torch.inf), 1)

    # Expected results

    def _by_segment(self, dtype: torch.dtype) -> Tensors:
        """Results by the definition in `dtype`, one segment at a time."""
        leaves = [x.detach().to(dtype).requires_grad_() for x in self.leaves]
        pieces = [
            x.split(self.lengths) if packed else x.unbind(0)
            for x, packed in zip(leaves, self.is_packed[1:], strict=True)
        ]
        rows = [self._one(*piece) for piece in zip(*pieces, strict=True)]
        out = torch.cat(rows) if self.is_packed[0] else torch.stack(rows)
        return (out.detach(), *torch.autograd.grad(out, leaves, self.grad.to(dtype)))

    def _one(self, *x: Tensor) -> Tensor:
        if self.job == MATMUL:
            return x[0] @ x[1]
        if self.job == SOFTMAX:
            return torch.softmax(x[0], 0)
        q, k, v = x
        return torch.softmax(q * WIDTH**-0.5 @ k.t(), 1) @ v


def _ours_target(query: Tensor, key: Jagged, value: Jagged) -> Tensor:
    return ops.jagged_dense_attention(query, key, value, scale=WIDTH**-0.5)


def batch_lengths(grid: Grid, length: int, sparsity: float, options: Options) -> list[int]:
    """Segment lengths by Meta's generator, with at least one token in the batch."""
    lengths = meta_lengths(grid.segments, length, sparsity, options.seed)
    return lengths if any(lengths) else [1, *lengths[1:]]


def _name(job: str, sparsity: float, length: int) -> str:
    return f"{job}, sparsity {sparsity}, length {length}"


def _grid(options: Options) -> Grid:
    return QUICK_GRID if options.quick else GRIDS[options.device]


def _figures(options: Options, cases: list[CaseResult]) -> list[Figure]:
    """Key figures beside those of the paper, whose GPU and shapes are not public; on a GPU two of them are limits."""
    promised = options.device == "cuda" and not options.quick
    found, length = Results(cases), _grid(options).lengths[-1]

    def times(job: str, other: str, ours: str = OURS) -> float | None:
        case = _name(job, MIDDLE, length)
        return ratio(found.seconds(case, other), found.seconds(case, ours))

    def sizes(other: str, ours: str = OURS) -> float | None:
        case = _name(SELF, MIDDLE, length)
        return ratio(found.memory(case, other), found.memory(case, ours))

    over_flash = sizes(FLASH)
    saved = None if not over_flash else 100 * (1 - 1 / over_flash)
    return [
        Figure(f"{SELF}: time of {DENSE} / {OURS} (published: 9x)", times(SELF, DENSE), "x"),
        Figure(f"{SELF}: memory of {DENSE} / {OURS} (published: 22x)", sizes(DENSE), "x"),
        Figure(f"{SELF}: time of {FLASH} / {OURS} (published: 3x)", times(SELF, FLASH), "x"),
        Figure(f"{SELF}: memory saved over {FLASH} (published: 53 %)", saved, "%"),
        Figure(f"{SELF}: time of {DENSE} / {UNFUSED} (published: 2x)", times(SELF, DENSE, UNFUSED), "x"),
        Figure(f"{SELF}: memory of {DENSE} / {UNFUSED} (published: 3.5x)", sizes(DENSE, UNFUSED), "x"),
        Figure(
            f"{MATMUL}: time of {DENSE} / {OURS} (published: 2.52x)",
            times(MATMUL, DENSE),
            "x",
            ">= 2.52" if promised else None,
        ),
        Figure(
            f"{SOFTMAX}: time of {DENSE} / {OURS} (published: 3.06x)",
            times(SOFTMAX, DENSE),
            "x",
            ">= 3.06" if promised else None,
        ),
        Figure(f"{TARGET}: time of {DENSE} / {OURS}", times(TARGET, DENSE), "x"),
        Figure(f"{TARGET}: time of {FLASH} / {OURS}", times(TARGET, FLASH), "x"),
    ]


@suite(
    "paper",
    "Jagged Flash Attention's comparisons, forward and backward, one head of 64, Meta's lengths, padded to N. The "
    "figures are of sparsity 0.5 and the largest N; those in parentheses are the paper's, whose GPU and shapes are "
    "not public. A CPU gets a smaller grid.",
    _figures,
)
def cases(options: Options) -> list[Case]:
    """All computations at the middle sparsity and largest N; self-attention also over the grid."""
    grid = _grid(options)
    # Those with a key figure first.
    points = [(job, MIDDLE, grid.lengths[-1]) for job in (MATMUL, SOFTMAX, SELF, TARGET)]
    points += [(SELF, s, n) for s in SPARSITIES for n in grid.lengths if (SELF, s, n) not in points]
    out = []
    for job, sparsity, length in points:
        lengths = batch_lengths(grid, length, sparsity, options)
        facts: dict[str, Any] = {"segments": grid.segments, "length": length, "sparsity": sparsity}
        facts |= {"tokens": sum(lengths), "fill": sum(lengths) / (grid.segments * length), "dim": WIDTH}
        facts |= {"dtype": "bfloat16" if options.device == "cuda" else "float32", "seed": options.seed}
        if job != SELF and job != SOFTMAX:
            facts["targets"] = TARGETS
        arms = partial(_arms, job, grid, length, sparsity, options)
        small = partial(_arms, job, QUICK_GRID, QUICK_GRID.lengths[0], sparsity, options)
        has_figure = sparsity == MIDDLE and length == grid.lengths[-1]
        out.append(Case(_name(job, sparsity, length), facts, arms, small, late=not has_figure))
    return out


def _arms(job: str, grid: Grid, length: int, sparsity: float, options: Options) -> Sequence[Arm]:
    return PaperProblem(job, grid, length, sparsity, options).arms()
