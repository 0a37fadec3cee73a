"""Suite ``step``: time of planning a batch, done once for all layers, relative to one layer's training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from flexjag.algebra.facts import as_window
from flexjag.algebra.masks import Causal, Prefix, Window
from flexjag.api.attention import attention
from flexjag.api.plan import plan
from flexjag.bench.measuring.lengths import document_lengths
from flexjag.bench.measuring.measure import Results, ratio
from flexjag.bench.measuring.padded import Expected, Tensors
from flexjag.bench.suites.registry import Arm, Case, CaseResult, Figure, Options, suite
from flexjag.jagged import Jagged

CHECKED = 512  # tokens of the segment whose gradient is compared, at most
PLAN, FIXED, STEP = "plan", "plan of fixed capacity", "one layer, forward + backward"
MASKS = {"causal": Causal(), "window | prefix": Window(128, 0) | Prefix(4)}


@dataclass(frozen=True)
class StepSizes:
    """Sizes: T tokens in documents of at most `longest` each, heads H, head dimension D; the model's width is H·D."""

    tokens: int
    longest: int
    heads: int
    dim: int


QUICK_SIZES = StepSizes(512, 256, 2, 16)
SIZES = {"cpu": StepSizes(8192, 4096, 4, 64), "cuda": StepSizes(65536, 16384, 16, 64)}


class Layer:
    """One attention layer with its projections, and the plans for it.

    Args:
        kind: Name of the mask in :data:`MASKS`.
        sizes: Sizes of the batch and the layer.
        options: Device and seed.
    """

    def __init__(self, kind: str, sizes: StepSizes, options: Options) -> None:
        self.mask, self.sizes = MASKS[kind], sizes
        lengths = [min(n, sizes.longest) for n in document_lengths(sizes.tokens, options.seed)]
        lengths += [sizes.tokens - sum(lengths)]  # the rest of the tokens
        dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        generator = torch.Generator(options.device).manual_seed(options.seed)
        width = sizes.heads * sizes.dim

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=options.device).to(dtype).requires_grad_()

        self.x, self.into, self.out = draw(sizes.tokens, width), draw(width, 3 * width), draw(width, width)
        self.grad = draw(sizes.tokens, width).detach()
        self.batch = Jagged.from_lengths(self.x.detach(), torch.tensor(lengths, device=options.device))

    def arms(self) -> list[Arm]:
        """Arms: planning, planning with fixed capacity, and the layer's training step."""
        free = partial(plan, self.batch, mask=self.mask)
        fixed = partial(free, max_tokens=self.sizes.tokens, max_length=self.sizes.longest)
        return [
            Arm(PLAN, lambda: lambda: free().block_mask, self._check_plan, memory=False),
            Arm(FIXED, lambda: lambda: fixed().block_mask, self._check_plan),
            Arm(STEP, self._step, self._check_step, memory=False),
        ]

    def _step(self) -> Callable[[], Sequence[Tensor]]:
        made, heads, scale = plan(self.batch, mask=self.mask), self.sizes.heads, self.x.shape[1] ** -0.5

        def call() -> Sequence[Tensor]:
            parts = (self.x @ self.into * scale).unflatten(1, (3, heads, -1)).unbind(1)
            got = attention(*(self.batch.with_values(p) for p in parts), plan=made)
            assert isinstance(got, Jagged)
            out = got.values.flatten(1) @ self.out
            return torch.autograd.grad(out, (self.x, self.into, self.out), self.grad)

        return call

    def _check_plan(self, got: object) -> str | None:
        wanted = plan(self.batch.to("cpu"), mask=self.mask).block_mask
        same = torch.equal(getattr(got, "kv_num_blocks").cpu(), wanted.kv_num_blocks)  # noqa: B009
        return None if same else "its tiles are not those of a plan made on the host"

    def _check_step(self, got: Sequence[Tensor]) -> str | None:
        """The inputs' gradient in one segment of moderate length, which depends on no other; the rest is finite."""
        if not all(bool(x.isfinite().all()) for x in got):
            return "a gradient is not finite"
        return self._expected.check((got[0][self._rows],))

    @cached_property
    def _rows(self) -> slice:
        lengths = self.batch.lengths.tolist()
        index = max(range(len(lengths)), key=lambda i: lengths[i] if lengths[i] <= CHECKED else -lengths[i])
        start = sum(lengths[:index])
        return slice(start, start + lengths[index])

    @cached_property
    def _expected(self) -> Expected:
        def compute(dtype: torch.dtype) -> Tensors:
            x, into, out = (t.detach().to(dtype) for t in (self.x[self._rows], self.into, self.out))
            one = Jagged.from_lengths(x.requires_grad_(), [x.shape[0]])
            parts = (x @ into * self.x.shape[1] ** -0.5).unflatten(1, (3, self.sizes.heads, -1)).unbind(1)
            got = attention(*(one.with_values(p) for p in parts), mask=self.mask, backend="reference")
            assert isinstance(got, Jagged)
            return torch.autograd.grad(got.values.flatten(1) @ out, x, self.grad[self._rows].to(dtype))

        return Expected(compute, self.x.dtype, ("dx",), terms=self.x.shape[1])


def _figures(options: Options, cases: list[CaseResult]) -> list[Figure]:
    found = Results(cases)
    promised = options.device == "cuda" and not options.quick
    return [
        Figure(
            f"{kind}: time of {arm} / {STEP}",
            ratio(found.seconds(kind, arm), found.seconds(kind, STEP)),
            "x",
            "<= 0.03" if promised and arm == FIXED else None,
        )
        for kind in MASKS
        for arm in (PLAN, FIXED)
    ]


@suite(
    "step",
    "What it takes to plan a batch of documents, beside a training step of one layer's attention with its projections. "
    "A plan is made once for all layers.",
    _figures,
)
def cases(options: Options) -> list[Case]:
    """One case per mask: one with a single span per query, and one with two."""
    sizes = QUICK_SIZES if options.quick else SIZES[options.device]
    facts = {"tokens": sizes.tokens, "longest": sizes.longest, "heads": sizes.heads, "dim": sizes.dim}
    facts |= {"dtype": "bfloat16" if options.device == "cuda" else "float32", "seed": options.seed}
    return [
        Case(
            kind,
            facts,
            partial(_arms, kind, sizes, options),
            partial(_arms, kind, QUICK_SIZES, options),
            compiles=as_window(mask) is None,  # else by varlen_attn
        )
        for kind, mask in MASKS.items()
    ]


def _arms(kind: str, sizes: StepSizes, options: Options) -> list[Arm]:
    return Layer(kind, sizes, options).arms()
