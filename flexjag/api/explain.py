"""Explanation of a plan's decisions: facts ready for JSON, and the same as text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from flexjag.algebra.normalizers import Softmax
from flexjag.backends.base import ASSUMED_DIMS, Case
from flexjag.backends.choose import BACKENDS, choose, refusal
from flexjag.lowering.recipe import Recipe

LONGEST = 1000  # characters of a mask's, a score's or a reason's text


def facts(plan: Recipe) -> dict[str, Any]:
    """Return everything :func:`explain` says, ready for JSON. Syncs with the device a few times."""
    layout = plan.layout
    case = Case.of(plan)
    backend, reason = choose(case)
    rows, cols = plan.grid
    tiles = plan.num_tiles
    heads, _, dim, _ = case.dims or ASSUMED_DIMS
    found: dict[str, Any] = {
        "segments": layout.num_segments,
        "tokens_q": layout.num_q,
        "tokens_kv": layout.num_kv,
        "longest": _longest(layout.kv_offsets),
        "device": str(layout.device),
        "mask": repr(plan.mask),
        "mask_exact": plan.exact,
        "spans_per_row": max(x.outer.count for x in plan.sandwiches),
        "score": None if plan.score is None else repr(plan.score),
        "normalizer": repr(plan.normalizer),
        "block_size": plan.block_size,
        "grid": [rows, cols],
        "tiles": tiles,
        "tiles_full": plan.num_full,
        "density": tiles / (rows * cols) if layout.num_q and layout.num_kv else 0.0,
        "plan_bytes": _bytes(plan),
        "dense_mask_bytes": layout.num_q * layout.num_kv,
        "heads": heads,
        "head_dim": dim,
        "dtype": None if case.dtype is None else str(case.dtype).removeprefix("torch."),
        "gradients": bool(case.grad),
        "assumed": plan.sample is None,
        "backend": backend,
        "backend_reason": reason,
        "backend_in_a_graph": choose(replace(case, tracing=True))[0],
        "not": {b: why for b in BACKENDS if b != backend and (why := refusal(b, case)) is not None},
    }
    records = [x for b, x in BACKENDS.items() if b not in found["not"] and x.scores is not None]
    if len(records) > 1:  # else there is nothing to compare
        found["scores"] = {x.name: x.scores(plan, case) for x in records if x.scores is not None}
        found["scores_in_spans"] = _in_spans(plan)
    if plan.sample is not None:
        padded = layout.num_segments * _longest(layout.q_offsets) * found["longest"]
        found |= {"flops": 4 * tiles * plan.block_size**2 * heads * dim, "padded_flops": 4 * padded * heads * dim}
    return found


def _in_spans(plan: Recipe) -> float:
    """Number of scores of a head within the mask's spans."""
    each = torch.stack([(x.outer.hi - x.outer.lo).sum() for x in plan.sandwiches])
    return float(each.sum() if plan.head_of is None else each[plan.head_of].double().mean())


def _longest(offsets: torch.Tensor) -> int:
    return int(offsets.diff().max()) if offsets.shape[0] > 1 else 0


def _bytes(plan: Recipe) -> int:
    """Bytes of memory that the plan holds, shared storage counted once."""
    storages: dict[int, int] = {}

    def visit(x: object) -> None:
        if isinstance(x, torch.Tensor):
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(x, (tuple, list)):
            for y in x:
                visit(y)
        elif hasattr(x, "__dataclass_fields__"):
            for name in x.__dataclass_fields__:  # type: ignore[attr-defined]
                visit(getattr(x, name))

    visit((plan.layout, plan.sandwiches, plan.tables, plan.tiles, plan.head_of))
    return sum(storages.values())


def counted(count: int, noun: str) -> str:
    """A number and its noun, in the plural unless the number is 1.

    >>> counted(1, "token"), counted(0, "token")
    ('1 token', '0 tokens')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def shortened(text: str, longest: int) -> str:
    """The text, with its middle replaced by an ellipsis if it is longer than `longest` characters.

    >>> shortened("Causal() & Window(64, 0)", 19)
    'Causal() … ow(64, 0)'
    """
    return text if len(text) <= longest else f"{text[: longest // 2]}… {text[len(text) - longest // 2 :]}"


def si(value: float, unit: str) -> str:
    """A quantity with three significant digits and a decimal prefix.

    >>> si(999, "B"), si(28_600, "B"), si(1.64e16, "FLOP")
    ('999 B', '28.6 kB', '16.4 PFLOP')
    """
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
    step = 0
    while step + 1 < len(prefixes) and float(f"{value:.3g}") >= 1000:
        value, step = value / 1000, step + 1
    return f"{value:.0f} {unit}" if step == 0 else f"{value:.3g} {prefixes[step]}{unit}"


def share(part: float, whole: float) -> str:
    """Ratio of `part` to `whole`, in percent or, if it is much more, as a factor.

    >>> share(35, 100), share(16384, 1), share(5, 0)
    ('35%', '16384 times', 'all')
    """
    if not whole:
        return "all"
    return f"{part / whole:.0%}" if part < 10 * whole else f"{part / whole:.0f} times"


def explain(plan: Recipe) -> str:
    """Explain a plan in a few lines of text: mask, tiles, backend, costs.

    >>> from flexjag import Causal, Jagged, plan
    >>> x = Jagged.from_lengths(torch.zeros(300, 2, 16), [100, 200])
    >>> print(plan(x, mask=Causal()).explain().splitlines()[1])
    mask      Causal() — exact, 1 span per row
    """
    f = facts(plan)
    tokens = counted(f["tokens_q"], "token")
    if f["tokens_q"] != f["tokens_kv"]:
        tokens = f"{f['tokens_q']} x {counted(f['tokens_kv'], 'token')}"
    spans = f"{counted(f['spans_per_row'], 'span')} per row"
    exact = f"exact, {spans}" if plan.exact else f"within {spans}; the rest is a predicate, evaluated in PARTIAL tiles"
    rows, cols = plan.grid
    tiles, full = f["tiles"], f["tiles_full"]
    lines = [
        f"batch     {counted(f['segments'], 'segment')}, {tokens}, longest {f['longest']}, on {f['device']}",
        f"mask      {shortened(f['mask'], LONGEST)} — {exact}",
        f"score     {shortened(f['score'] or 'none', LONGEST)}; normalizer {shortened(f['normalizer'], LONGEST)}",
        f"tiles     {tiles} of {rows} x {cols} ({f['density']:.1%}) at {plan.block_size} x {plan.block_size}: "
        f"{tiles - full} partial, {full} full",
        f"memory    plan {si(f['plan_bytes'], 'B')}; a dense mask would take {si(f['dense_mask_bytes'], 'B')}",
    ]
    if "flops" in f:
        flops, padded = f["flops"], f["padded_flops"]
        lines.append(
            f"compute   {si(flops, 'FLOP')} forward in tiles; padded {si(padded, 'FLOP')} ({share(flops, padded)})"
        )
    if "scores" in f:
        needed = f["scores_in_spans"]
        parts = [f"{share(needed, count)} of {si(count, 'scores')} by {name}" for name, count in f["scores"].items()]
        lines.append(f"needed    {', '.join(parts)}")
    return "\n".join([*lines, *_backends(plan, f)])


def _backends(plan: Recipe, f: dict[str, Any]) -> list[str]:
    """Lines about the backends, and about the q that they were chosen for."""
    given = "assumed: the plan was made from values without heads" if f["assumed"] else "as in the q planned for"
    lines = [
        f"for       {counted(f['heads'], 'head')} of {f['head_dim']}, {f['dtype'] or 'any dtype'}, "
        f"{'with' if f['gradients'] else 'without'} gradients; {given}",
        f"backend   {f['backend']}: {shortened(f['backend_reason'], LONGEST)}",
    ]
    able = [b for b in BACKENDS if b != f["backend"] and b not in f["not"]]
    if able:
        lines.append(f"  also    {', '.join(able)} can run it")
    lines += [f"  not     {name}: {shortened(why, LONGEST)}" for name, why in f["not"].items()]
    inside = f["backend_in_a_graph"]
    if inside != f["backend"]:
        lines.append(f"compiled  {inside}, as torch.compile cannot trace {f['backend']}{_slower(plan, inside)}")
    return lines


def _slower(plan: Recipe, inside: str) -> str:
    """Slowdown of a graph on a CPU, as measured there; only for the kind of attention that was measured."""
    if inside != "tiled" or plan.layout.device.type != "cpu" or not isinstance(plan.normalizer, Softmax):
        return ""
    return "; on a CPU usually slower than eager: a training step took 1.5 times as long"
