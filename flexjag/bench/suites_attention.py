"""Attention over a jagged batch, beside a loop over segments and beside padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexjag.attention import attention
from flexjag.bench.measure import Results, disagreement, ratio
from flexjag.bench.registry import Arm, Case, CaseResult, Figure, Options, suite
from flexjag.jagged import Jagged
from flexjag.masks import Causal, Mask, Prefix, Window
from flexjag.plan import plan
from flexjag.scores import Alibi

LOCATION, SIGMA = 5.0, 0.9

LOOP = "SDPA loop over segments"
PADDED = "padded SDPA, mask per segment"
SHARED = "padded SDPA, one mask for all"
SOFTMAX = "padded dense softmax"
AUTO = "flexjag auto"
WITH_PLAN = ", planning included"

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sizes:
    """Segments S, cap on a segment's length, heads H, head dim D."""

    segments: int
    longest: int
    heads: int
    dim: int


FULL_SIZES = Sizes(32, 1024, 4, 64)
QUICK_SIZES = Sizes(6, 96, 2, 16)


def lognormal_lengths(sizes: Sizes, seed: int) -> list[int]:
    """Log-normal(5, 0.9) lengths between 1 and the cap, seeded."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.empty(sizes.segments).log_normal_(LOCATION, SIGMA, generator=generator)
    return draws.long().clamp(1, sizes.longest).tolist()


class Batch:
    """One batch, and the arms over it. What an arm needs beyond q, k and v is made by the arm.

    Args:
        sizes: How large.
        windowed: Whether the mask is ``Window(128, 0) | Prefix(4)`` with ALiBi; otherwise it is causal.
        backward: Whether gradients are computed too.
        options: Device and seed.
    """

    def __init__(self, sizes: Sizes, windowed: bool, backward: bool, options: Options) -> None:
        self.lengths = lognormal_lengths(sizes, options.seed)
        self.windowed, self.backward, self.device = windowed, backward, options.device
        self.tokens, self.longest = sum(self.lengths), max(self.lengths)
        generator = torch.Generator().manual_seed(options.seed)
        shape = (self.tokens, sizes.heads, sizes.dim)
        self.q, self.k, self.v, self.grad = (torch.randn(shape, generator=generator).to(self.device) for _ in range(4))
        self.mask: Mask = Window(128, 0) | Prefix(4) if windowed else Causal()
        self.score = Alibi.from_heads(sizes.heads, self.device) if windowed else None
        self.heads, self.dim = sizes.heads, sizes.dim
        if backward:
            for x in (self.q, self.k, self.v):
                x.requires_grad_()

    def arms(self) -> list[Arm]:
        """All arms of this case."""
        matrix = 4 * self.heads * len(self.lengths) * self.longest**2  # bytes of one padded score matrix
        arms = [] if self.windowed else [self._arm(LOOP, self._loop)]
        arms += [
            self._arm(PADDED, partial(self._padded, shared=False), 3 * matrix),
            self._arm(SHARED, partial(self._padded, shared=True), 2 * matrix),
            self._arm(SOFTMAX, self._softmax, 8 * matrix),
        ]
        for backend in ("auto", "tiled", "segments"):
            arms.append(self._arm(f"flexjag {backend}", partial(self._flexjag, backend, ready=True)))
            planned = self._arm(
                f"flexjag {backend}{WITH_PLAN}", partial(self._flexjag, backend, ready=False), memory=False
            )
            arms.append(planned)
        return arms

    def _arm(self, name: str, forward: Callable[[], Callable[[], Tensor]], needs: int = 0, memory: bool = True) -> Arm:
        def make() -> Callable[[], Tensors]:
            return self._whole(forward())

        return Arm(name, make, self._check, needs, memory=memory)

    def _whole(self, forward: Callable[[], Tensor]) -> Callable[[], Tensors]:
        """The call to be timed: the output, and the gradients if they are wanted."""

        def inference() -> Tensors:
            with torch.no_grad():
                return (forward(),)

        def training() -> Tensors:
            out = forward()
            return (out.detach(), *torch.autograd.grad(out, (self.q, self.k, self.v), self.grad))

        return training if self.backward else inference

    def _check(self, got: Any) -> str | None:
        exact, rounded = self._expected
        return disagreement(got, exact, rounded)

    @cached_property
    def _expected(self) -> tuple[Tensors, Tensors]:
        """The reference's results in float64 and in the inputs' precision."""
        found = []
        for dtype in (torch.float64, self.q.dtype):
            q, k, v = (x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v))
            x, y, z = (Jagged.from_lengths(t, self.lengths) for t in (q, k, v))
            out = _values(attention(x, y, z, mask=self.mask, score=self.score, backend="reference"))
            grads = torch.autograd.grad(out, (q, k, v), self.grad.to(dtype)) if self.backward else ()
            found.append((out.detach(), *grads))
        return found[0], found[1]

    def _flexjag(self, backend: str, ready: bool) -> Callable[[], Tensor]:
        q = Jagged.from_lengths(self.q, self.lengths)
        k, v = q.with_values(self.k), q.with_values(self.v)
        if not ready:
            return lambda: _values(attention(q, k, v, mask=self.mask, score=self.score, backend=backend))
        made = plan(q, k, mask=self.mask, score=self.score)
        return lambda: _values(attention(q, k, v, plan=made, backend=backend))

    def _loop(self) -> Callable[[], Tensor]:
        def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            x, y, z = (t.transpose(0, 1)[None] for t in (q, k, v))
            return scaled_dot_product_attention(x, y, z, is_causal=True)[0].transpose(0, 1)

        def forward() -> Tensor:
            q, k, v = (x.split(self.lengths) for x in (self.q, self.k, self.v))
            return torch.cat([one(*piece) for piece in zip(q, k, v, strict=True)])

        return forward

    def _pad(self, index: Tensor, x: Tensor) -> Tensor:
        """[T, H, D] to [S, H, N, D]."""
        count = len(self.lengths)
        flat = x.new_zeros(count * self.longest, *x.shape[1:]).index_copy(0, index, x)
        return flat.view(count, self.longest, *x.shape[1:]).transpose(1, 2)

    def _padding_index(self) -> Tensor:
        """``[T]``: where each packed token sits in the padded batch."""
        rows = [torch.arange(n) + s * self.longest for s, n in enumerate(self.lengths)]
        return torch.cat(rows).to(self.device)

    def _allowed(self) -> Tensor:
        """Boolean ``[1, 1, N, N]``: the mask by position. With fewer dimensions SDPA leaves its fast path."""
        i = torch.arange(self.longest, device=self.device)[None, None, :, None]
        j = i.transpose(2, 3)
        return ((i - 128 <= j) & (j <= i)) | (j < 4) if self.windowed else j <= i

    def _with_score(self, allowed: Tensor) -> Tensor:
        """A boolean mask as SDPA takes it: as it is, or as a bias that also holds ALiBi."""
        if self.score is None:
            return allowed
        i = torch.arange(self.longest, device=self.device)
        bias = self.score.slopes[:, None, None] * (i - i[:, None])
        return bias.masked_fill(~allowed, -torch.inf)

    def _mask_per_segment(self) -> Tensor:
        """Boolean or float ``[S, H or 1, N, N]``. Rows of padding attend key 0, so that they are not NaN."""
        allowed = self._allowed()
        each = torch.zeros(len(self.lengths), 1, *allowed.shape[2:], dtype=torch.bool, device=self.device)
        for s, n in enumerate(self.lengths):
            each[s, 0, :n, :n] = allowed[0, 0, :n, :n]
            each[s, 0, n:, 0] = True
        return self._with_score(each)

    def _padded(self, shared: bool) -> Callable[[], Tensor]:
        """Padded SDPA. A mask shared by all segments is right while real rows allow no key of the padding."""
        index = self._padding_index()
        options: dict[str, Any] = {"is_causal": True}
        if not shared:
            options = {"attn_mask": self._mask_per_segment()}
        elif self.windowed:
            options = {"attn_mask": self._with_score(self._allowed())}

        def forward() -> Tensor:
            q, k, v = (self._pad(index, x) for x in (self.q, self.k, self.v))
            out = scaled_dot_product_attention(q, k, v, **options)
            return out.transpose(1, 2).flatten(0, 1).index_select(0, index)

        return forward

    def _softmax(self) -> Callable[[], Tensor]:
        """Padded attention as it is written down in a textbook."""
        index, mask = self._padding_index(), self._mask_per_segment()
        scale = self.dim**-0.5

        def forward() -> Tensor:
            q, k, v = (self._pad(index, x) for x in (self.q, self.k, self.v))
            scores = q * scale @ k.transpose(2, 3)
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            out = torch.softmax(scores, 3) @ v
            return out.transpose(1, 2).flatten(0, 1).index_select(0, index)

        return forward


def _values(out: Jagged | tuple[Jagged, Jagged]) -> Tensor:
    assert isinstance(out, Jagged)
    return out.values


def _name(windowed: bool, backward: bool) -> str:
    mask = "window | prefix + ALiBi" if windowed else "causal"
    return f"{mask}, forward{' + backward' if backward else ''}"


def _figures(options: Options, cases: list[CaseResult]) -> list[Figure]:
    found = Results(cases)
    limits = {
        (False, False): (("<= 1.1", LOOP), (">= 6", PADDED)),
        (False, True): (("<= 1.0", LOOP), (">= 2.5", PADDED)),
        (True, False): ((None, PADDED),),
        (True, True): ((">= 2", PADDED),),
    }
    figures = []
    for (windowed, backward), wanted in limits.items():
        case = _name(windowed, backward)
        for arm in (AUTO, AUTO + WITH_PLAN):
            ours = found.seconds(case, arm)
            for limit, other in wanted:
                theirs = found.seconds(case, other)
                if other == LOOP:
                    figures.append(Figure(f"{case}: time of {arm} / {other}", ratio(ours, theirs), "x", limit))
                else:
                    figures.append(Figure(f"{case}: time of {other} / {arm}", ratio(theirs, ours), "x", limit))
            for other in (SHARED, SOFTMAX) if arm == AUTO else ():
                figures.append(Figure(f"{case}: time of {other} / {arm}", ratio(found.seconds(case, other), ours), "x"))
        share = ratio(found.memory(case, AUTO), found.memory(case, PADDED))
        figures.append(Figure(f"{case}: memory of {AUTO} / {PADDED}", share, "x"))
    promised = not options.quick and options.device == "cpu"
    return figures if promised else [Figure(f.text, f.value, f.unit) for f in figures]


@suite("attention", "32 segments, log-normal(5, 0.9) tokens up to 1024, 4 heads of 64, float32.", _figures)
def cases(options: Options) -> list[Case]:
    """Both masks, forward and forward + backward."""
    sizes = QUICK_SIZES if options.quick else FULL_SIZES
    lengths = lognormal_lengths(sizes, options.seed)
    fill = sum(lengths) / (len(lengths) * max(lengths))
    facts = {"segments": len(lengths), "tokens": sum(lengths), "longest": max(lengths), "fill": fill}
    facts |= {"heads": sizes.heads, "dim": sizes.dim, "dtype": "float32", "seed": options.seed}
    out = []
    for windowed in (False, True):
        for backward in (False, True):
            arms, small = (partial(_arms, x, windowed, backward, options) for x in (sizes, QUICK_SIZES))
            out.append(Case(_name(windowed, backward), facts, arms, small))
    return out


def _arms(sizes: Sizes, windowed: bool, backward: bool, options: Options) -> list[Arm]:
    return Batch(sizes, windowed, backward, options).arms()
