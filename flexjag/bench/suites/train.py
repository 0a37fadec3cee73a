"""Suite ``train``: training steps of a small language model and a small sequential recommender, packed and padded."""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import inspect
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flexjag.bench.arms.models import Decoder, Recommender
from flexjag.bench.measuring.lengths import lognormal_lengths
from flexjag.bench.measuring.measure import Results, ratio
from flexjag.bench.measuring.padded import Padding
from flexjag.bench.suites.registry import Arm, Case, CaseResult, Figure, Options, suite
from flexjag.jagged import Jagged

STEPS = 10
RATE = 1e-3  # of AdamW
IGNORED = -100  # cross_entropy's ignore_index
LONG_TAIL = 0.9  # sigma of the log-normal lengths; their medians are chosen for a fill of about 30 %
TEXTS = (argparse, ast, dataclasses, inspect, typing)
"""Modules of the standard library whose sources the language model reads."""

PACKED, LOOP, PADDED = "flexjag, packed", "SDPA loop over segments, packed", "padded"
SEGMENTS, COMPILED = "flexjag segments, packed", "flexjag, packed, compiled"
DECODER, RECOMMENDER = "decoder on bytes", "HSTU on items"

Model = Decoder | Recommender
Loss = Callable[[Any, "TrainingBatch"], Tensor]
"""The loss of a model on a batch."""


@dataclass(frozen=True)
class TrainingSizes:
    """Sizes of the batches and the model.

    Attributes:
        segments: Segments S per batch.
        longest: Maximum length of a segment.
        median: Median length of a segment.
        width: Features per token.
        heads: Number of heads H.
        layers: Number of layers.
        vocabulary: Number of distinct tokens.
    """

    segments: int
    longest: int
    median: int
    width: int
    heads: int
    layers: int
    vocabulary: int


SIZES = {
    DECODER: {
        "quick": TrainingSizes(4, 32, 6, 16, 2, 1, 256),
        "cpu": TrainingSizes(16, 512, 85, 128, 4, 2, 256),
        "cuda": TrainingSizes(64, 2048, 430, 512, 8, 2, 256),
    },
    RECOMMENDER: {
        "quick": TrainingSizes(4, 32, 6, 16, 2, 1, 50),
        "cpu": TrainingSizes(32, 256, 50, 64, 2, 2, 1000),
        "cuda": TrainingSizes(256, 512, 115, 256, 4, 2, 5000),
    },
}


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """A batch in packed and in padded form, with next-token targets. Made by the data loader, not timed.

    Attributes:
        lengths: Segment lengths.
        tokens: Packed tokens ``[T]``.
        targets: Packed targets ``[T]``; :data:`IGNORED` for the last token of a segment.
        padded_tokens: Padded tokens ``[S, N]``.
        padded_targets: Padded targets ``[S, N]``; :data:`IGNORED` for padding, too.
    """

    lengths: list[int]
    tokens: Jagged
    targets: Tensor
    padded_tokens: Tensor
    padded_targets: Tensor

    @staticmethod
    def of(pieces: Sequence[Tensor], device: str) -> TrainingBatch:
        """Make a batch from one tensor of tokens ``[n]`` per segment."""
        lengths = [x.shape[0] for x in pieces]
        end = torch.tensor([IGNORED])
        targets = torch.cat([torch.cat([x[1:], end]) for x in pieces])
        packed, padding = torch.cat(list(pieces)), Padding(lengths, "cpu")
        hidden = padding.pad(targets).masked_fill(~padding.real, IGNORED)
        on_device = (x.to(device) for x in (packed, targets, padding.pad(packed), hidden))
        values, wanted, *padded = on_device
        return TrainingBatch(lengths, Jagged.from_lengths(values, lengths), wanted, *padded)


def byte_pieces(lengths: Sequence[int], seed: int) -> list[Tensor]:
    """Byte sequences of the given lengths from the sources of :data:`TEXTS`, at seeded offsets."""
    texts = [Path(str(module.__file__)).read_bytes() for module in TEXTS]
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for i, n in enumerate(lengths):
        text = texts[i % len(texts)]
        start = int(torch.randint(0, max(1, len(text) - n), (), generator=generator))
        pieces.append(torch.frombuffer(bytearray(text[start : start + n]), dtype=torch.uint8).long())
    return pieces


def item_pieces(lengths: Sequence[int], items: int, seed: int) -> list[Tensor]:
    """Item sequences of the given lengths: seeded random walks over the items, so that the next item is learnable."""
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.randint(1, 4, (n,), generator=generator) for n in lengths]
    starts = torch.randint(0, items, (len(lengths),), generator=generator).tolist()
    return [(start + step.cumsum(0)) % items for start, step in zip(starts, steps, strict=True)]


class Training:
    """:data:`STEPS` optimizer steps over as many batches, from the same initial weights in every arm.

    Args:
        case: The model: :data:`DECODER` or :data:`RECOMMENDER`.
        sizes: Sizes of the batches and the model.
        options: Device and seed.
    """

    def __init__(self, case: str, sizes: TrainingSizes, options: Options) -> None:
        self.device, self.is_decoder = options.device, case == DECODER
        self.compiler = "aot_eager" if options.quick else "inductor"
        self.batches = [
            TrainingBatch.of(pieces, options.device) for pieces in _pieces(case, sizes, options.seed * STEPS, STEPS)
        ]
        self.model = _model(case, sizes, options.seed).to(options.device)
        # The padded logits are the largest tensor; with softmax and gradient about three of its size are held.
        places = max(x.padded_tokens.numel() for x in self.batches)
        longest = max(x.padded_tokens.shape[1] for x in self.batches)
        scores = 0 if self.is_decoder else 6 * sizes.layers * sizes.heads * places * longest
        self.needs = 4 * (3 * places * sizes.vocabulary + 30 * sizes.layers * places * sizes.width + scores)

    def arms(self) -> list[Arm]:
        """Arms: training with packed batches, with a loop over segments, and with padded batches.

        The decoder on a CPU also runs with the backend ``segments``, and compiled.
        """
        tokens = sum(sum(x.lengths) for x in self.batches) // STEPS
        losses: dict[str, Loss] = {PACKED: _packed_loss, PADDED: _padded_loss}
        if self.is_decoder:
            losses[LOOP] = _looped_loss
        if self.is_decoder and self.device == "cpu":
            losses |= {SEGMENTS: _segments_loss, COMPILED: _compiled_loss(self.compiler)}
        return [
            Arm(
                name,
                partial(self._make, losses[name]),
                partial(self._check, losses[name]),
                self.needs if name == PADDED else 0,
                memory=name != COMPILED,  # the compiler's own
                steps=STEPS,
                tokens=tokens,
            )
            for name in (PACKED, SEGMENTS, COMPILED, LOOP, PADDED)
            if name in losses
        ]

    def _make(self, loss: Loss) -> Callable[[], Tensor]:
        model = copy.deepcopy(self.model)
        return lambda: self._train(model, loss)

    def _train(self, model: nn.Module, loss: Loss) -> Tensor:
        """The loss of each step ``[STEPS]``, from the initial weights and a fresh optimizer."""
        with torch.no_grad():
            for x, first in zip(model.parameters(), self.model.parameters(), strict=True):
                x.copy_(first)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        curve = []
        half = self.device == "cuda" and next(model.parameters()).dtype == torch.float32
        for batch in self.batches:
            optimizer.zero_grad()
            with torch.autocast(self.device, torch.bfloat16, enabled=half):
                value = loss(model, batch)
            value.backward()
            optimizer.step()
            curve.append(value.detach())
        return torch.stack(curve)

    def _check(self, loss: Loss, curve: Tensor) -> str | None:
        if self.device == "cuda":
            # An error of one token at a boundary is hidden by half precision, but not in a first loss in float32.
            wrong = self._check_first(loss)
            if wrong is not None:
                return wrong
        exact, rounded = self._expected
        terms = 1 if self.device == "cuda" else max(sum(x.lengths) for x in self.batches)
        unit = torch.finfo(torch.bfloat16 if self.device == "cuda" else curve.dtype).eps
        return curve_disagreement(curve, exact, rounded, unit, terms)

    def _check_first(self, loss: Loss) -> str | None:
        """Check the loss of the initial weights in float32: the error's description or None, as :meth:`_check`."""
        batch, terms = self.batches[0], max(sum(x.lengths) for x in self.batches)
        with torch.no_grad():
            got = loss(self.model, batch)[None]
            exact = _loss_by_segment(copy.deepcopy(self.model).double(), batch)[None]
            same = _loss_by_segment(self.model, batch)[None]
        return curve_disagreement(got, exact, same, torch.finfo(torch.float32).eps, terms)

    @cached_property
    def _expected(self) -> tuple[Tensor, Tensor]:
        """Loss curves in float64 and in the arms' precision, by segment, so without padding and without flexjag."""
        same, exact = copy.deepcopy(self.model), copy.deepcopy(self.model).double()
        return self._train(exact, _loss_by_segment), self._train(same, _loss_by_segment)


def curve_disagreement(got: Tensor, exact: Tensor, rounded: Tensor, unit: float, terms: int) -> str | None:
    """Check a curve of losses against float64.

    The tolerance is twice the sum of the largest error of the same steps in the same precision and a rounding of the
    largest loss, ``sqrt(terms)·unit·max|exact|``. In float32 that rounding grows with the root of the number of tokens
    that gradients sum in free order, as independent roundings do. In bfloat16 the tokens share the rounded weights: a
    rounding of the logits is a rounding of the loss.

    Args:
        got: Losses of an arm ``[STEPS]``.
        exact: Losses in float64 ``[STEPS]``.
        rounded: Losses of a plain computation in the arm's precision ``[STEPS]``.
        unit: Machine epsilon of that precision.
        terms: Number of terms that a gradient sums in free order.

    Returns:
        A description of the first step out of tolerance; None if there is none.
    """
    error = (got.double() - exact.double()).abs()
    known = float((rounded.double() - exact.double()).abs().max())
    allowed = 2 * (known + math.sqrt(terms) * unit * float(exact.abs().max()))
    if bool((error <= allowed).all()):
        return None
    step = int((~(error <= allowed)).nonzero()[0])
    return f"the loss of step {step + 1} is off by {float(error[step]):.2e}, more than the {allowed:.2e} of rounding"


def _packed_loss(model: Model, batch: TrainingBatch) -> Tensor:
    return _loss(model.packed(batch.tokens), batch.targets)


def _segments_loss(model: Decoder, batch: TrainingBatch) -> Tensor:
    return _loss(model.packed(batch.tokens, "segments"), batch.targets)


def _compiled_loss(compiler: str) -> Loss:
    packed = torch.compile(Decoder.packed, fullgraph=True, dynamic=True, backend=compiler)
    return lambda model, batch: _loss(packed(model, batch.tokens), batch.targets)


def _looped_loss(model: Decoder, batch: TrainingBatch) -> Tensor:
    return _loss(model.looped(batch.tokens, batch.lengths), batch.targets)


def _padded_loss(model: Model, batch: TrainingBatch) -> Tensor:
    return _loss(model.padded(batch.padded_tokens), batch.padded_targets)


def _loss_by_segment(model: Model, batch: TrainingBatch) -> Tensor:
    """Mean loss over the tokens that have a target, with the model applied to one segment at a time."""
    total = torch.zeros((), device=batch.targets.device)
    for x, y in zip(batch.tokens.values.split(batch.lengths), batch.targets.split(batch.lengths), strict=True):
        total = total + _loss(model.padded(x[None]), y[None], "sum")
    return total / (batch.targets != IGNORED).sum()


def _loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


def _pieces(case: str, sizes: TrainingSizes, seed: int, count: int) -> list[list[Tensor]]:
    batches = []
    for i in range(count):
        location = math.log(sizes.median)
        lengths = lognormal_lengths(sizes.segments, sizes.longest, seed + i, location, LONG_TAIL)
        if case == DECODER:
            batches.append(byte_pieces(lengths, seed + i))
        else:
            batches.append(item_pieces(lengths, sizes.vocabulary, seed + i))
    return batches


def _model(case: str, sizes: TrainingSizes, seed: int) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if case == DECODER:
            return Decoder(sizes.layers, sizes.width, sizes.heads, sizes.longest)
        return Recommender(sizes.vocabulary, sizes.layers, sizes.width, sizes.heads, sizes.longest)


def _figures(options: Options, cases: list[CaseResult]) -> list[Figure]:
    found = Results(cases)
    figures = []
    for case in (DECODER, RECOMMENDER):
        ours, theirs = found.seconds(case, PACKED), found.seconds(case, PADDED)
        limit = ">= 2" if case == DECODER and not options.quick else None
        figures.append(Figure(f"{case}: tokens per second of {PACKED} / {PADDED}", ratio(theirs, ours), "x", limit))
        if case == DECODER and options.device == "cpu":
            value = ratio(found.seconds(case, SEGMENTS), found.seconds(case, COMPILED))
            text = f"{case}: tokens per second of {COMPILED} / {SEGMENTS}"
            figures.append(Figure(text, value, "x", None if options.quick else ">= 1.4"))
        share = ratio(found.memory(case, PACKED), found.memory(case, PADDED))
        figures.append(Figure(f"{case}: memory of {PACKED} / {PADDED}", share, "x"))
    return figures


@suite("train", "One optimizer step, packed and padded: the same weights, the same batches, the same loss.", _figures)
def cases(options: Options) -> list[Case]:
    """One case per model. Planning is timed as part of a step; packing and padding are not."""
    kind = "quick" if options.quick else options.device
    out = []
    for name, choices in SIZES.items():
        sizes = choices[kind]
        lengths = [[x.shape[0] for x in batch] for batch in _pieces(name, sizes, options.seed * STEPS, STEPS)]
        places = sum(len(batch) * max(batch) for batch in lengths)
        facts = {"batches": STEPS, "segments": sizes.segments, "longest": sizes.longest}
        facts |= {"tokens": sum(map(sum, lengths)) // STEPS, "fill": sum(map(sum, lengths)) / places}
        facts |= {"layers": sizes.layers, "width": sizes.width, "heads": sizes.heads, "vocabulary": sizes.vocabulary}
        facts |= {"precision": "bfloat16 autocast" if options.device == "cuda" else "float32", "seed": options.seed}
        arms, small = (partial(_arms, name, x, options) for x in (sizes, choices["quick"]))
        out.append(Case(name, facts, arms, small))
    return out


def _arms(case: str, sizes: TrainingSizes, options: Options) -> list[Arm]:
    return Training(case, sizes, options).arms()
