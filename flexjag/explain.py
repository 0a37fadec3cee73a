"""What a plan decided and why: as facts for programs, as text for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from flexjag import choice

if TYPE_CHECKING:
    from flexjag.plan import Plan


def facts(plan: Plan) -> dict[str, Any]:
    """Everything :func:`explain` says, ready for JSON. Reads the device a few times."""
    layout = plan.layout
    backend, reason = choice.choose(plan.case())
    rows, cols = plan.grid
    lengths = layout.kv_offsets.diff()
    found: dict[str, Any] = {
        "segments": layout.num_segments,
        "tokens_q": layout.num_q,
        "tokens_kv": layout.num_kv,
        "longest": int(lengths.max()) if layout.num_segments else 0,
        "device": str(layout.device),
        "mask": repr(plan.mask),
        "mask_exact": plan.exact,
        "spans_per_row": max(x.outer.count for x in plan.sandwiches),
        "score": None if plan.score is None else repr(plan.score),
        "normalizer": repr(plan.normalizer),
        "block_size": plan.block_size,
        "grid": [rows, cols],
        "tiles": plan.num_tiles,
        "tiles_full": plan.num_full,
        "density": plan.density,
        "plan_bytes": _bytes(plan),
        "dense_mask_bytes": layout.num_q * layout.num_kv,
        "backend": backend,
        "backend_reason": reason,
        "not": {
            b: why for b in choice.BACKENDS if b != backend and (why := choice.refusal(b, plan.case())) is not None
        },
    }
    if plan.sample is not None:
        heads, dim, dtype, _ = plan.sample
        found |= {"heads": heads, "head_dim": dim, "dtype": str(dtype).removeprefix("torch."), "flops": plan.flops}
        longest = [int(o.diff().max()) if layout.num_segments else 0 for o in (layout.q_offsets, layout.kv_offsets)]
        found["padded_flops"] = 4 * layout.num_segments * longest[0] * longest[1] * heads * dim
    return found


def _bytes(plan: Plan) -> int:
    """What the plan keeps in memory, shared storage counted once."""
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

    visit((plan.layout, plan.sandwiches, plan.tables, plan.made_tiles, plan.head_of))
    return sum(storages.values())


def _si(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000 or prefix == "T":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if prefix == "" else f"{value:.3g} {prefix}{unit}"


def explain(plan: Plan) -> str:
    """The facts as a few lines of text.

    >>> from flexjag import Causal, Jagged, plan
    >>> x = Jagged.from_lengths(torch.zeros(300, 2, 16), [100, 200])
    >>> print(plan(x, mask=Causal()).explain().splitlines()[1])
    mask      Causal() — exact, 1 span per row
    """
    f = facts(plan)
    tokens = (
        f"{f['tokens_q']} tokens" if f["tokens_q"] == f["tokens_kv"] else f"{f['tokens_q']} x {f['tokens_kv']} tokens"
    )
    spans = f"{f['spans_per_row']} span{'s' if f['spans_per_row'] != 1 else ''} per row"
    exact = f"exact, {spans}" if plan.exact else f"within {spans}; the rest is a predicate, evaluated in PARTIAL tiles"
    segments = f"{f['segments']} segment{'s' if f['segments'] != 1 else ''}"
    rows, cols = plan.grid
    partial = plan.num_tiles - plan.num_full
    lines = [
        f"batch     {segments}, {tokens}, longest {f['longest']}, on {f['device']}",
        f"mask      {f['mask']} — {exact}",
        f"score     {f['score'] or 'none'}; normalizer {f['normalizer']}",
        f"tiles     {plan.num_tiles} of {rows} x {cols} ({plan.density:.1%}) at {plan.block_size} x {plan.block_size}: "
        f"{partial} partial, {plan.num_full} full",
        f"memory    plan {_si(f['plan_bytes'], 'B')}; a dense mask would take {_si(f['dense_mask_bytes'], 'B')}",
    ]
    if plan.sample is not None:
        flops, padded = f["flops"], f["padded_flops"]
        share = flops / max(1, padded)
        lines.append(f"compute   {_si(flops, 'FLOP')} forward in tiles; padded {_si(padded, 'FLOP')} ({share:.0%})")
    lines.append(f"backend   {f['backend']}: {f['backend_reason']}")
    able = [b for b in choice.BACKENDS if b != f["backend"] and b not in f["not"]]
    if able:
        lines.append(f"  also    {', '.join(able)} can run it")
    lines += [f"  not     {name}: {why}" for name, why in f["not"].items()]
    return "\n".join(lines)
