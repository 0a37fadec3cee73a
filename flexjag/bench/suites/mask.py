"""Suite ``mask-build``: time and memory of building the BlockMask of a packed causal batch, by number of tokens."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from flexjag.algebra.masks import Causal
from flexjag.api.plan import plan
from flexjag.bench.measuring.lengths import document_lengths
from flexjag.bench.measuring.measure import Results, ratio
from flexjag.bench.suites.registry import Arm, Case, CaseResult, Figure, Options, suite
from flexjag.jagged import Jagged

BLOCK = 128
MEAN, SIGMA = 400.0, 1.0
EAGER_BYTES_PER_PAIR = 10  # measured at 32,768 tokens
PLAN_BYTES_PER_TOKEN = 200  # measured: 130

FLEXJAG = "flexjag plan"
EAGER = "create_block_mask, eager"
GYM_MOD = "attn-gym document mask, eager"
GYM_FAST = "attn-gym fast causal builder"


@dataclass(frozen=True)
class MaskSizes:
    """Numbers of tokens T, for cases with all arms (`shared`) and for cases of flexjag alone (`alone`)."""

    shared: tuple[int, int]
    alone: tuple[int, int, int]


FULL_SIZES = MaskSizes((8_192, 32_768), (131_072, 1_048_576, 8_388_608))
QUICK_SIZES = MaskSizes((1_024, 2_048), (2_560, 5_120, 10_240))


def lognormal_lengths(tokens: int, seed: int) -> Tensor:
    """Log-normal document lengths ``[S]``, int64, that sum to `tokens`: the batch of this suite."""
    return torch.tensor(document_lengths(tokens, seed, MEAN, SIGMA))


def causal_tiles(lengths: Tensor) -> Tensor:
    """Non-empty tiles of a causal mask over segments, computed from the lengths alone: the oracle of this suite.

    A row of tiles reaches from the start of its first token's segment to the diagonal. A tile left of the diagonal is
    FULL if the segment of the row's last token starts at or before the tile.

    Args:
        lengths: ``[S]``, all at least 1.

    Returns:
        ``[3, N]`` int64: row, column and whether it is FULL, sorted by row, then column.
    """
    ends = lengths.cumsum(0)
    tokens, starts = int(ends[-1]), ends - lengths
    row = torch.arange((tokens + BLOCK - 1) // BLOCK)
    first, last = row * BLOCK, (row * BLOCK + BLOCK - 1).clamp(max=tokens - 1)
    first_start, last_start = (starts[torch.searchsorted(ends, x, right=True)] for x in (first, last))
    left = first_start // BLOCK
    rows = row.repeat_interleave(row - left + 1)
    col = _ranks(row - left + 1) + left[rows]
    full = (col < rows) & (last_start[rows] <= col * BLOCK) & (last - first == BLOCK - 1)[rows]
    return torch.stack([rows, col, full.long()])


def _ranks(counts: Tensor) -> Tensor:
    """Concatenated ranges 0 … count - 1 of all counts."""
    return torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)


def listed_tiles(partial: Tensor, partial_index: Tensor, full: Tensor, full_index: Tensor) -> Tensor:
    """The tiles of a BlockMask's tables (by query or by key), in the form that :func:`causal_tiles` returns."""
    parts = []
    for kind, count, index in ((0, partial, partial_index), (1, full, full_index)):
        n = count[0, 0].long().cpu()
        row = torch.arange(n.shape[0]).repeat_interleave(n)
        col = index[0, 0][row.to(index.device), _ranks(n).to(index.device)].long().cpu()
        parts.append(torch.stack([row, col, torch.full_like(row, kind)]))
    tiles = torch.cat(parts, 1)
    return tiles[:, (tiles[0] * (int(tiles[1].max()) + 1) + tiles[1]).argsort()]


def _check(lengths: Tensor) -> Callable[[Any], str | None]:
    def check(mask: BlockMask) -> str | None:
        want = causal_tiles(lengths)
        by_key = torch.stack([want[1], want[0], want[2]])
        by_key = by_key[:, (by_key[0] * (int(want[0].max()) + 1) + by_key[1]).argsort()]
        sides = (
            ("key", want, (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)),
            ("query", by_key, (mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices)),
        )
        for side, expected, tables in sides:
            if any(x is None for x in tables):
                return f"the {side} tables are incomplete"
            got = listed_tiles(*tables)  # type: ignore[arg-type]
            if not torch.equal(got, expected):
                return f"its {side} tables hold {got.shape[1]} tiles, not the {expected.shape[1]} right ones"
        return None

    return check


def _flexjag(lengths: Tensor, device: str) -> Arm:
    x = Jagged.from_lengths(torch.zeros(int(lengths.sum()), device=device), lengths)
    build = lambda: plan(x, mask=Causal(), block_size=BLOCK).block_mask  # noqa: E731
    return Arm(FLEXJAG, lambda: build, _check(lengths), PLAN_BYTES_PER_TOKEN * x.values.shape[0])


def _eager(lengths: Tensor, device: str) -> Arm:
    tokens = int(lengths.sum())
    document = torch.arange(lengths.shape[0]).repeat_interleave(lengths).to(device)

    def causal_document(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (document[q] == document[kv]) & (q >= kv)

    build = lambda: create_block_mask(causal_document, None, None, tokens, tokens, device, BLOCK)  # noqa: E731
    return Arm(EAGER, lambda: build, _check(lengths), EAGER_BYTES_PER_PAIR * tokens**2)


def _gym(name: str) -> tuple[Any, str | None]:
    """A function of attn-gym's masks and None, or None and the reason for which it is absent."""
    try:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(f"attn_gym.masks.{module}"), attribute), None
    except (ImportError, AttributeError) as e:
        return None, f"attn-gym has no masks.{name} here: {e}"


def _gym_documents(lengths: Tensor, device: str) -> Arm:
    tokens = int(lengths.sum())
    make_mod, absent = _gym("document_mask.generate_packed_causal_doc_mask_mod")
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device, torch.int32)

    def make() -> Callable[[], BlockMask]:
        return lambda: create_block_mask(make_mod(offsets), None, None, tokens, tokens, device, BLOCK)

    return Arm(GYM_MOD, make, _check(lengths), EAGER_BYTES_PER_PAIR * tokens**2, absent)


def _gym_fast(lengths: Tensor, device: str) -> Arm:
    tokens = int(lengths.sum())
    build, absent = _gym("causal.create_causal_block_mask_fast")
    if absent is None and lengths.shape[0] > 1:
        absent = "it knows one sequence, not several"
    return Arm(GYM_FAST, lambda: lambda: build(None, None, tokens, tokens, device, BLOCK), _check(lengths), 0, absent)


def _documents(tokens: int, options: Options, alone: bool) -> Callable[[], list[Arm]]:
    def arms() -> list[Arm]:
        lengths = lognormal_lengths(tokens, options.seed)
        makers = (_flexjag,) if alone else (_flexjag, _eager, _gym_documents, _gym_fast)
        return [make(lengths, options.device) for make in makers]

    return arms


def _one_segment(tokens: int, device: str) -> Callable[[], list[Arm]]:
    def arms() -> list[Arm]:
        return [make(torch.tensor([tokens]), device) for make in (_flexjag, _gym_fast)]

    return arms


def _figures(options: Options, cases: list[CaseResult]) -> list[Figure]:
    sizes = QUICK_SIZES if options.quick else FULL_SIZES
    found = Results(cases)
    big, (small, million, huge) = sizes.shared[1], sizes.alone
    seconds = {n: found.seconds(_name(n), FLEXJAG) for n in (big, *sizes.alone)}
    memory = {n: found.memory(_name(n), FLEXJAG) for n in (big, *sizes.alone)}
    megabytes = memory[million]
    figures = [
        Figure(
            f"time of {EAGER} / flexjag, {big:,} tokens",
            ratio(found.seconds(_name(big), EAGER), seconds[big]),
            "x",
            ">= 1000",
        ),
        Figure(
            f"memory of flexjag / {EAGER}, {big:,} tokens",
            ratio(memory[big], found.memory(_name(big), EAGER)),
            "x",
            "<= 0.02",
        ),
        Figure(f"flexjag, {million:,} tokens", seconds[million], "s", "<= 2"),
        Figure(f"flexjag, {huge:,} tokens", seconds[huge], "s", "<= 10"),
        Figure(f"flexjag's memory, {million:,} tokens", None if megabytes is None else megabytes / 1e6, "MB", "<= 600"),
        Figure(f"time of {million:,} / {small:,} tokens", ratio(seconds[million], seconds[small]), "x", "<= 12"),
        Figure(f"time of {huge:,} / {million:,} tokens", ratio(seconds[huge], seconds[million]), "x", "<= 12"),
        Figure(f"memory of {huge:,} / {million:,} tokens", ratio(memory[huge], memory[million]), "x"),
    ]
    promised = not options.quick and options.device == "cpu"
    return figures if promised else [Figure(f.text, f.value, f.unit) for f in figures]


def _name(tokens: int) -> str:
    return f"documents, {tokens:,} tokens"


@suite("mask-build", "From lengths to a causal BlockMask, log-normal lengths of mean about 400.", _figures)
def cases(options: Options) -> list[Case]:
    """All arms at the two shared sizes, flexjag alone beyond, and one long segment, which attn-gym's builder takes."""
    sizes = QUICK_SIZES if options.quick else FULL_SIZES
    little = QUICK_SIZES.shared[0]
    out = []
    for tokens in (*sizes.shared, *sizes.alone):
        alone = tokens in sizes.alone
        segments = lognormal_lengths(tokens, options.seed).shape[0]
        facts = {"tokens": tokens, "segments": segments, "seed": options.seed, "mean": MEAN, "sigma": SIGMA}
        out.append(Case(_name(tokens), facts, _documents(tokens, options, alone), _documents(little, options, alone)))
    for tokens in sizes.shared:
        facts = {"tokens": tokens, "segments": 1}
        name = f"one segment, {tokens:,} tokens"
        out.append(Case(name, facts, _one_segment(tokens, options.device), _one_segment(little, options.device)))
    return out
