"""Suite ``energy``: joules of causal attention, forward and backward, by the device's own energy counter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexjag.algebra.masks import Causal
from flexjag.api.attention import attention
from flexjag.api.plan import plan
from flexjag.bench.arms.models import causal_sdpa
from flexjag.bench.measuring import energy
from flexjag.bench.measuring.lengths import lognormal_lengths
from flexjag.bench.measuring.measure import Results, describe_error, median, ratio
from flexjag.bench.measuring.padded import Expected, Padding, Tensors, with_gradients
from flexjag.bench.suites.registry import ArmResult, CaseResult, Figure, Options, SelfTimedCase, Tell, suite
from flexjag.jagged import Jagged

WINDOW, QUICK_WINDOW = 10.0, 0.2  # seconds of repeated calls
WARM_UP = 3  # calls
OURS, PADDED, LOOP = "flexjag", "padded SDPA", "SDPA loop over segments"
CASE = "causal, forward + backward"


@dataclass(frozen=True)
class EnergySizes:
    """Sizes of the suite's batch: segments S, maximum length of a segment, heads H, head dimension D."""

    segments: int
    longest: int
    heads: int
    dim: int


QUICK_SIZES = EnergySizes(4, 32, 2, 16)
SIZES = {"cpu": EnergySizes(32, 1024, 4, 64), "cuda": EnergySizes(128, 2048, 16, 64)}


class EnergyBatch:
    """One batch of the energy suite, and the calls to be measured on it.

    Args:
        sizes: Sizes of the batch.
        options: Device and seed.
    """

    def __init__(self, sizes: EnergySizes, options: Options) -> None:
        self.lengths = lognormal_lengths(sizes.segments, sizes.longest, options.seed)
        self.tokens, self.padding = sum(self.lengths), Padding(self.lengths, options.device)
        dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        generator = torch.Generator().manual_seed(options.seed)
        shape = (self.tokens, sizes.heads, sizes.dim)
        drawn = [torch.randn(shape, generator=generator).to(options.device, dtype) for _ in range(4)]
        self.leaves, self.grad = [x.requires_grad_() for x in drawn[:3]], drawn[3]
        self.expected = Expected(self._exact, dtype, terms=sizes.dim)

    def calls(self) -> dict[str, Callable[[], Tensors]]:
        """Calls to be measured, by arm name. Inputs and outputs are packed; plan and padding index are made here."""
        q, k, v = self.leaves
        x = Jagged.from_lengths(q, self.lengths)
        made = plan(x, mask=Causal())

        def ours() -> Tensor:
            out = attention(x, x.with_values(k), x.with_values(v), plan=made)
            assert isinstance(out, Jagged)
            return out.values

        forwards = {OURS: ours, PADDED: lambda: self._padded(q, k, v), LOOP: lambda: self._loop(q, k, v)}
        return {name: with_gradients(forward, self.leaves, self.grad) for name, forward in forwards.items()}

    def _padded(self, *qkv: Tensor) -> Tensor:
        return self.padding.unpad(causal_sdpa(*(self.padding.pad(x) for x in qkv)))

    def _loop(self, *qkv: Tensor) -> Tensor:
        pieces = zip(*(x.split(self.lengths) for x in qkv), strict=True)
        return torch.cat([causal_sdpa(*(x[None] for x in piece))[0] for piece in pieces])

    def _exact(self, dtype: torch.dtype) -> Tensors:
        q, k, v = leaves = [x.detach().to(dtype).requires_grad_() for x in self.leaves]
        x = Jagged.from_lengths(q, self.lengths)
        out = attention(x, x.with_values(k), x.with_values(v), mask=Causal(), backend="reference")
        assert isinstance(out, Jagged)
        return (out.values.detach(), *torch.autograd.grad(out.values, leaves, self.grad.to(dtype)))


def _measure(batch: EnergyBatch, options: Options, tell: Tell) -> list[ArmResult]:
    """Measure the arms one after the other: the counter covers the whole device, so they cannot be interleaved."""
    try:
        counter = energy.find_counter(options.device)
    except energy.NoCounterError as e:
        return [ArmResult(name, "skipped", str(e)) for name in (OURS, PADDED, LOOP)]
    return [_arm(name, call, batch, counter, options, tell) for name, call in batch.calls().items()]


def _arm(
    name: str, call: Callable[[], Tensors], batch: EnergyBatch, counter: energy.Counter, options: Options, tell: Tell
) -> ArmResult:
    if options.over:
        return ArmResult(name, "skipped", "the time for this suite was used up before it")
    tell(f"checking {name}")
    try:
        wrong = batch.expected.check(call())
        if wrong is not None:
            return ArmResult(name, "wrong", wrong)
        window = QUICK_WINDOW if options.quick else WINDOW
        tell(f"{window:g} s of {name}")
        for _ in range(WARM_UP):
            call()
        used = energy.measure_energy(call, window, counter, options.device)
    except Exception as e:  # any exception is the arm's result
        return ArmResult(name, "failed", describe_error(e))
    return ArmResult(name, "ok", seconds=[median(used.seconds)], extra=used.extra(batch.tokens, counter))


def _figures(options: Options, cases: list[CaseResult]) -> list[Figure]:
    found = Results(cases)
    joules = {name: found.extra(CASE, name, "joules_per_call") for name in (OURS, PADDED, LOOP)}
    figures = [
        Figure(f"{CASE}: energy of {other} / {OURS}", ratio(joules[other], joules[OURS]), "x")
        for other in (PADDED, LOOP)
    ]
    rate = found.extra(CASE, OURS, "tokens_per_joule")
    return [*figures, Figure(f"{CASE}: {OURS}", rate, "tokens/J")]


@suite(
    "energy",
    "Energy of causal attention by the device's counter over at least ten seconds of repeated calls, idle power "
    "included; no figure where there is no counter.",
    _figures,
)
def cases(options: Options) -> Sequence[SelfTimedCase]:
    """One batch. Each arm has one sample, the median over all calls within the window."""
    sizes = QUICK_SIZES if options.quick else SIZES[options.device]
    lengths = lognormal_lengths(sizes.segments, sizes.longest, options.seed)
    facts: dict[str, Any] = {"segments": sizes.segments, "tokens": sum(lengths), "longest": max(lengths)}
    facts |= {"fill": sum(lengths) / (len(lengths) * max(lengths)), "heads": sizes.heads, "dim": sizes.dim}
    facts |= {"dtype": "bfloat16" if options.device == "cuda" else "float32", "seed": options.seed}
    return [SelfTimedCase(CASE, facts, lambda tell: _measure(EnergyBatch(sizes, options), options, tell))]
