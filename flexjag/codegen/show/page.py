"""Generator of ``docs/kernels.md``: registers and instructions of every mask and score of the algebra, on three GPUs.

Run ``python -m flexjag.codegen docs/kernels.md``. It takes about half an hour on two cores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexjag.algebra import masks as m
from flexjag.algebra import scores as s
from flexjag.api.plan import Plan, plan
from flexjag.codegen import cache
from flexjag.codegen.compile import Report, compile_for
from flexjag.codegen.read.loops import Loop
from flexjag.codegen.report import Kernel, blocks_text
from flexjag.codegen.targets import TARGETS
from flexjag.codegen.worker import Worker
from flexjag.errors import CodegenError
from flexjag.jagged import Jagged
from flexjag.lowering import tiles

LENGTHS = (3000, 1000, 100)  # not multiples of the tile size, like real batches; the kernels do not depend on them
HEADS = 8
DIMS = (64, 128)
GPUS = ("sm_80", "sm_90", "sm_100")


def _dilated(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (q - kv) % 4 == 0


def _distance(x: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return x - (q - kv).abs() * 0.01


def masks_and_scores() -> dict[str, tuple[m.Mask, s.Score | None]]:
    """The table's cases by name: every mask node alone or with causality, every score node on a causal mask."""
    total, areas = sum(LENGTHS), sum(n * n for n in LENGTHS)
    generator = torch.Generator().manual_seed(0)
    at = torch.arange(total, dtype=torch.int32)
    rows = torch.stack([(at % 64 - 16).clamp(min=0), at % 64 + 32]), torch.stack([at % 64 + 8, at % 64 + 64])
    causal = m.Causal()
    return {
        "`Full()`": (m.Full(), None),
        "`Causal()`": (causal, None),
        "`Causal() & Window(256, 0)`": (causal & m.Window(256, 0), None),
        "`Causal() | Prefix(64)`": (causal | m.Prefix(64), None),
        "`Causal() & (Window(256, 0) | Prefix(4))`": (causal & (m.Window(256, 0) | m.Prefix(4)), None),
        "`Chunked(512)`": (m.Chunked(512), None),
        "`GlobalTokens(16) | Window(128, 128)`": (m.GlobalTokens(16) | m.Window(128, 128), None),
        "`Rows`, 2 spans": (m.Rows(*rows), None),
        "`Causal() & SameGroup`": (causal & m.SameGroup(at // 50 % 7), None),
        "`Dense`": (m.Dense(torch.rand(areas, generator=generator) < 0.5), None),
        "`Causal() & MaskMod`": (causal & m.MaskMod(_dilated), None),
        "`PerHead`, 2 masks": (m.PerHead([causal] * 4 + [m.Window(64, 64)] * 4), None),
        "`Causal()`, learned `Alibi`": (causal, s.Alibi(torch.ones(HEADS, requires_grad=True))),
        "`Causal()`, `SoftCap`": (causal, s.SoftCap(30.0)),
        "`Causal()`, learned `RelativeBias`": (causal, s.RelativeBias(torch.ones(HEADS, 257, requires_grad=True))),
        "`Causal()`, `ScoreMod`": (causal, s.ScoreMod(_distance)),
    }


@dataclass(frozen=True, eq=False)
class PlainFlex:
    """Attention by a direct call of ``flex_attention`` with its default kernel options and any ``mask_mod``."""

    plan: Plan
    mask_mod: Callable[..., Tensor] | None = None

    def __call__(self, q: Jagged, k: Jagged, v: Jagged) -> Jagged:
        """Attention output for packed q, k and v."""
        from torch.nn.attention.flex_attention import flex_attention

        p, layout = self.plan, self.plan.layout
        mod = p.mask_mod if self.mask_mod is None else self.mask_mod
        block_mask = tiles.block_mask(p.tiles, mod, layout.num_q, layout.num_kv, p.block_size)
        x, y, z = (t.values.transpose(0, 1)[None] for t in (q, k, v))
        options: Any = {"BACKEND": "TRITON"}
        out = flex_attention(x, y, z, score_mod=p.score_mod, block_mask=block_mask, kernel_options=options)
        assert isinstance(out, Tensor)
        return q.with_values(out[0].transpose(0, 1))


def _document(inner: Callable[..., Tensor], offsets: Tensor) -> Callable[..., Tensor]:
    """attention-gym's document mask around a ``mask_mod`` of positions."""
    from attn_gym.masks import generate_doc_mask_mod

    return generate_doc_mask_mod(inner, offsets)


@dataclass(frozen=True)
class _Row:
    name: str
    variant: str
    target: str
    dim: int


def _rows() -> Iterator[_Row]:
    for target in GPUS:
        for dim in DIMS:
            for name, (_, score) in masks_and_scores().items():
                yield _Row(name, "flexjag", target, dim)
                if target == "sm_90":
                    yield _Row(name, "same, default options", target, dim)
                if score is None and name in _GYM:
                    yield _Row(name, "attention-gym", target, dim)


def _causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


def _window(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (q >= kv) & (q - kv <= 256)


_GYM = {"`Causal()`": _causal, "`Causal() & Window(256, 0)`": _window}
_HERE = threading.local()


def _compile(row: _Row) -> tuple[_Row, Report | CodegenError]:
    """Compile one row. Each thread reuses one worker per target."""
    if getattr(_HERE, "target", None) != row.target:
        if hasattr(_HERE, "worker"):
            _HERE.worker.close()
        _HERE.target, _HERE.worker = row.target, Worker().start()
    x = Jagged.from_lengths(torch.zeros(sum(LENGTHS), HEADS, row.dim, dtype=torch.bfloat16), list(LENGTHS))
    q, k, v = (x.with_values(x.values.clone().requires_grad_()) for _ in range(3))
    mask, score = masks_and_scores()[row.name]
    p = plan(x, mask=mask, score=score)
    try:
        if row.variant == "flexjag":
            return row, compile_for(row.target, p, q, k, v, worker=_HERE.worker)
        mod = _document(_GYM[row.name], x.offsets) if row.variant == "attention-gym" else None
        return row, compile_for(row.target, PlainFlex(p, mod), q, k, v, worker=_HERE.worker)
    except CodegenError as reason:
        return row, reason


def per_score(kernel: Kernel, loop: Loop) -> float | None:
    """Thread instructions of one loop per score it computes; None if they could not be attributed to loops."""
    if loop.instructions is None:
        return None
    number = "" if kernel.phase == "forward" else "2" if loop.over == "kv" else "1"
    scores = kernel.blocks[f"BLOCK_M{number}"] * kernel.blocks[f"BLOCK_N{number}"]
    return loop.instructions * kernel.num_warps * 32 / scores


def _cells(report: Report, phase: str) -> list[str]:
    kernel = report[phase]
    most = report.target.shared_per_block
    shared = f"{kernel.shared_bytes / 1024:.0f}" + (" **too much**" if kernel.shared_bytes > most else "")

    def work(masked: bool) -> str:
        found = [per_score(kernel, loop) for loop in kernel.loops if loop.masked == masked]
        return "?" if None in found else f"{sum(x for x in found if x is not None):.1f}"

    spilled = f"**{kernel.spilled_bytes}**" if kernel.spilled_bytes else "0"
    gathers = str(kernel.kv_indexed)
    blocks = f"{blocks_text(kernel.blocks)}, {kernel.num_warps} warps"
    return [blocks, str(kernel.registers), spilled, shared, gathers, work(True), work(False)]


def render(found: list[tuple[_Row, Report | CodegenError]]) -> str:
    """The page as Markdown, from the rows and their reports."""
    titles = ["mask, score", "mask_mod and options", "blocks", "registers", "spilled, B", "shared, KiB"]
    titles += ["KV gathers", "per score, PARTIAL", "per score, FULL"]
    lines = [_INTRODUCTION.format(**cache.versions(), tokens=sum(LENGTHS), heads=HEADS)]
    for target in GPUS:
        for dim in DIMS:
            for phase in ("forward", "backward"):
                lines.append(f"\n### {target} ({TARGETS[target].device}), D = {dim}, {phase}\n")
                lines.append("| " + " | ".join(titles) + " |")
                lines.append("|---|---|---|" + "--:|" * (len(titles) - 3))
                for row, report in found:
                    if (row.target, row.dim) != (target, dim):
                        continue
                    head = [row.name.replace("|", "\\|"), row.variant]
                    failed = isinstance(report, CodegenError)
                    cells = [f"failed: {report}"] + [""] * 6 if failed else _cells(report, phase)
                    lines.append("| " + " | ".join([*head, *cells]) + " |")
    return "\n".join(lines) + "\n"


def build(progress: Callable[[str], None], workers: int = 2) -> str:
    """Compile every row and return the page."""
    rows = list(_rows())
    with ThreadPoolExecutor(workers) as pool:
        found = []
        for i, (row, report) in enumerate(pool.map(_compile, rows), 1):
            progress(f"{i}/{len(rows)} {row.target} D={row.dim} {row.name} {row.variant}")
            found.append((row, report))
    return render(found)


_INTRODUCTION = """\
# Kernels

What every mask and score compiles to, read from the machine code: no GPU was used, nothing here was timed.
Written by `python -m flexjag.codegen docs/kernels.md` with torch {torch}, triton {triton}, flexjag {flexjag}.

bfloat16, {tokens} tokens in 3 segments, {heads} heads, sizes that vary from batch to batch. Columns:

- **mask_mod and options**: `flexjag` is what `fj.attention` runs on such a GPU. `same, default options` is the same
  plan given to `flex_attention` by hand, with the options that PyTorch picks: the state before flexjag chose its own
  (`flexjag/backends/flex/options.py`). `attention-gym` is the same tiles with attention-gym's document mask
  (`generate_doc_mask_mod`) in place of the interval form, default options.
- **spilled**: bytes per thread that the code stores to local memory because registers ran out.
- **shared**: KiB per block; *too much* is more than the GPU has, so that the kernel could not be launched.
- **KV gathers**: loads in the main loops that are indexed by the key's position, besides K and V. Masks made of spans
  have none. `SameGroup`, `Dense`, tables and users' functions may have them, and so has the document mask.
- **per score**: thread instructions in the main loops for each score (query and key), in tiles that are masked
  (PARTIAL) and in those that need no mask (FULL). The backward's figure adds its two loops, dQ and dK, dV. `?`: the
  loops of the machine code could not be matched with the kernel's.

Here T varies. If it is fixed at a multiple of the tile (`fj.plan(..., max_tokens=T)`), kernels need no bounds checks
and no remainders, and both figures per score fall.

**Tuning on your GPU.** Fewer instructions are no proof of speed. `python -m flexjag.bench tune` measures about a dozen
choices of blocks, warps, pipeline stages, TMA (from Hopper on) and, without gradients, PyTorch's FLASH backend where
`flash_attn.cute` is installed. Each is checked against float64, then timed in turn with the others. What beats the
built-in options by more than their samples spread goes into `tuning.json` in the folder that
`flexjag cache` names. From then on it goes over the built-in options, for plans of that kind (dtype, head dimensions,
score, mask of spans or not) on that device with those versions of torch and triton. The file is read once per process.
`--dim`, `--heads`, `--dtype`, `--tokens` and `--minutes` say what to measure, `--work formula lookup predicate` adds
scores and other masks. `FLEXJAG_TUNING=FILE` reads another file, `FLEXJAG_TUNING=` none. Not yet run on a GPU.
"""
