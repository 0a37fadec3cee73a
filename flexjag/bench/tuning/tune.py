"""Autotuner of FlexAttention's kernel options on this GPU: ``python -m flexjag.bench tune``.

The fastest options are written to the file that :mod:`flexjag.backends.flex.tuning` reads. Every candidate is checked
against float64 before it is timed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from flexjag.backends.flex import run as flex
from flexjag.backends.flex import tuning
from flexjag.bench.cli import Parser
from flexjag.bench.measuring.measure import median, quartiles, run_case
from flexjag.bench.suites.registry import ArmResult, BenchError, Case, Options, Tell
from flexjag.bench.tuning.candidates import (
    WORKS,
    Attend,
    Subject,
    TuningSizes,
    backward_candidates,
    forward_candidates,
    subjects,
)

BUILT_IN, FLASH = "built in", "FLASH"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Measure = Callable[[str, Case, Options, Tell], list[ArmResult]]

Found = Mapping[str, Mapping[str, ArmResult]]
"""Measurements by subject, then by candidate."""


def pick(found: Found, names: Sequence[str]) -> str | None:
    """The candidate with the least geometric mean of median times, of those that are right on every subject.

    To replace the built-in options, a candidate must win by more than the spread of their samples.

    Returns:
        Its name, or None if none is right on every subject.
    """
    right = [n for n in names if all(n in arms and arms[n].status == "ok" for arms in found.values())]

    def cost(name: str) -> float:
        return math.prod(median(arms[name].seconds) for arms in found.values()) ** (1 / len(found))

    best = min(right, key=cost, default=None)
    if best is None or BUILT_IN not in right:
        return best
    spread = max(_spread(arms[BUILT_IN].seconds) for arms in found.values())
    return best if cost(best) < cost(BUILT_IN) * (1 - spread) else BUILT_IN


def _spread(seconds: Sequence[float]) -> float:
    low, high = quartiles(seconds)
    return (high - low) / median(seconds)


def tune(
    work: str,
    sizes: TuningSizes,
    here: tuning.Device,
    shared: int,
    seconds: float,
    tell: Tell,
    *,
    attend: Attend = flex.with_options,
    measure: Measure = run_case,
    first: int | None = None,
    masks: int | None = None,
) -> list[tuning.Entry]:
    """Tune one kind of work. Returns the entries of the phases inference, forward and backward that had a winner.

    Args:
        work: Kind of work: a key of `WORKS`.
        sizes: Sizes of the batch.
        here: Device and versions that the entries are valid for.
        shared: Maximum bytes of shared memory per thread block.
        seconds: Time limit for all phases. Candidates without time left are not tried.
        tell: Progress callback.
        attend: Function of kernel options that returns a function like :func:`flexjag.backends.flex.run.run`.
        measure: Function that checks and times the arms of a case.
        first: Number of block shapes to try; None for all.
        masks: Number of masks to try them on; None for all.
    """
    end = time.monotonic() + seconds
    about = subjects(work, sizes, masks)
    score, exact = WORKS[work]
    dim = tuning.rounded(sizes.dim)
    assert dim is not None, "checked with the arguments"

    def run(candidates: Mapping[str, tuning.Options], backward: bool, parts_left: int) -> Found:
        found = {}
        for i, subject in enumerate(about):
            left = (end - time.monotonic()) / (parts_left - i)
            options = Options(device=sizes.device, seconds_per_arm=2.0, memory=False, seed=sizes.seed)
            options = replace(options, deadline=time.monotonic() + left)
            arms = subject.arms(attend, candidates, backward)
            case = Case(f"{work}, {subject.name}", {}, lambda arms=arms: arms, list)
            results = measure("tune", case, options, tell)
            for x in results:
                if x.status != "ok":
                    tell(f"tune: {case.name}: {x.name} is {x.status}: {x.reason}")
            found[subject.name] = {x.name: x for x in results}
        return found

    def entry(phase: tuning.Phase, best: str, candidates: Mapping[str, tuning.Options], found: Found) -> tuning.Entry:
        key = tuning.Work(tuning.dtype_name(sizes.dtype), dim, dim, score, exact, phase)
        return tuning.Entry(here, key, candidates[best], _measured(about, best, found, phase))

    made = []
    ahead: tuning.Options = {}
    candidates = {BUILT_IN: {}, **forward_candidates(sizes, here.capability, shared, first)}
    with_flash = dict(candidates)
    if (score, exact) == ("none", True) and tuning.flash_is_installed():
        with_flash[FLASH] = {"BACKEND": "FLASH"}
    found = run(with_flash, False, 2 * len(about))
    best = pick(found, list(with_flash))
    if best is not None:
        made.append(entry("inference", best, with_flash, found))
    best = pick(found, list(candidates))
    if best is not None:
        ahead = candidates[best]
        made.append(entry("forward", best, candidates, found))
    candidates = {BUILT_IN: {}, **backward_candidates(sizes, here.capability, shared, first)}
    found = run({name: {**ahead, **options} for name, options in candidates.items()}, True, len(about))
    best = pick(found, list(candidates))
    if best is not None:
        made.append(entry("backward", best, candidates, found))
    return made


def _measured(about: Sequence[Subject], best: str, found: Found, phase: tuning.Phase) -> dict[str, Any]:
    """The human-readable record of an entry's measurements that is kept in the file."""

    def result(arm: ArmResult) -> dict[str, Any]:
        return {"seconds": median(arm.seconds)} if arm.status == "ok" else {arm.status: arm.reason}

    sizes = about[0].sizes
    return {
        "best": best,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "median_of": "forward and backward" if phase == "backward" else "forward",
        "heads": [sizes.heads, sizes.kv_heads],
        "dim": sizes.dim,
        "tokens": sizes.tokens,
        "segments": len(about[0].lengths),
        "seed": sizes.seed,
        "candidates": {s: {name: result(arm) for name, arm in arms.items()} for s, arms in found.items()},
    }


def main(argv: Sequence[str]) -> int:
    """Tune all requested kinds of work, and write the file after each.

    Args:
        argv: Command-line arguments after ``tune``.

    Returns:
        0.

    Raises:
        BenchError: If the arguments are wrong or there is no GPU.
        OSError: If the file cannot be written.
    """
    args = _parse(argv)
    if not torch.cuda.is_available():
        raise BenchError("tune: needs a GPU; no CUDA device is available here")
    device = torch.device("cuda", torch.cuda.current_device())
    here = tuning.this_device(device)
    if here is None:
        raise BenchError("tune: needs Triton, which is not installed")
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    jobs = [
        (work, TuningSizes(args.heads, args.kv_heads or args.heads, dim, DTYPES[args.dtype], args.tokens, args.seed))
        for dim in args.dim
        for work in args.work
    ]
    return _tune_all(jobs, here, shared, args.out, 60 * args.minutes, _say, first=args.first, masks=args.masks)


def _tune_all(
    jobs: Sequence[tuple[str, TuningSizes]],
    here: tuning.Device,
    shared: int,
    out: Path,
    seconds: float,
    tell: Tell,
    **injected: Any,
) -> int:
    end = time.monotonic() + seconds
    for i, (work, sizes) in enumerate(jobs):
        made = tune(work, sizes, here, shared, (end - time.monotonic()) / (len(jobs) - i), tell, **injected)
        tuning.write(out, made)
        if not made:
            print(f"{work}, D {sizes.dim}: no candidate was right in the time there was, so the file stays as it is")
        for x in made:
            print(f"{work}, D {sizes.dim}, {x.work.phase}: {x.measured['best']}")
    print(f"wrote {out}", file=sys.stderr)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments.

    Raises:
        BenchError: If they are invalid, or the existing file is no file of tuned options.
        OSError: If the existing file cannot be read.
    """
    parser = Parser("flexjag bench tune", description="Find FlexAttention's fastest kernel options on this GPU.")
    parser.add_argument("--heads", type=int, default=8, help="H; default 8")
    parser.add_argument("--kv-heads", type=int, help="G; default H")
    parser.add_argument("--dim", type=int, nargs="+", default=[64, 128], help="D, one or more; default 64 128")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of q, k and v; default bf16")
    parser.add_argument("--tokens", type=int, default=32768, help="T; default 32768")
    parser.add_argument("--work", choices=tuple(WORKS), nargs="+", default=["spans"], help="default spans")
    parser.add_argument("--minutes", type=float, default=20.0, help="for everything; default 20")
    parser.add_argument("--first", type=int, metavar="N", help="try the first N blocks only; default all")
    parser.add_argument("--masks", type=int, metavar="N", help="on the first N masks of each work only; default all")
    parser.add_argument("--seed", type=int, default=0, help="what lengths and values are drawn from; default 0")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: the file that flexjag reads")
    args = parser.parse_args(argv)
    args.out = args.out or tuning.path()
    heads, kv_heads = args.heads, args.kv_heads or args.heads
    if min(heads, kv_heads) < 1 or heads % kv_heads:
        raise BenchError(f"--heads: must be a multiple of --kv-heads; got heads={heads}, kv_heads={kv_heads}")
    if not all(16 <= dim <= tuning.DIMS[-1] for dim in args.dim):
        raise BenchError(f"--dim: must be from 16 to {tuning.DIMS[-1]}; got dim={args.dim}")
    if args.tokens < 1 or not args.minutes > 0:
        raise BenchError(f"--tokens, --minutes: must be over 0; got tokens={args.tokens}, minutes={args.minutes}")
    if args.out is None:
        raise BenchError("--out: must be given while FLEXJAG_TUNING is empty")
    if args.out.exists():
        try:
            tuning.read(args.out)
        except ValueError as reason:
            raise BenchError(f"--out: {args.out} is there and is no file of tuned options: {reason}") from None
    return args
