"""``flexjag compile``: make a plan's GPU kernels, print what they cost, keep them, and run them on the CPU."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexjag.algebra.masks import Mask
from flexjag.algebra.scores import Score, tensors
from flexjag.api.plan import Plan, plan
from flexjag.cli.options import LANGUAGE, add_batch_options, parse_lengths, progress, read_mask, whole
from flexjag.codegen.targets import TARGETS, get_target
from flexjag.errors import CommandError
from flexjag.jagged import Jagged

if TYPE_CHECKING:
    from flexjag.cli.options import Commands
    from flexjag.codegen.compile import Report

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LENGTHS = "3900,0,17,80"
SIMULATED = 512  # tokens; the interpreter takes tens of milliseconds for each tile of each head
MOST_ELEMENTS = 2**28  # of q, and of k or v; each is copied once


def add_command(commands: Commands) -> None:
    """Register the command and its options."""
    parser = commands.add_parser(
        "compile",
        help="make the GPU kernels of a plan, without a GPU",
        description="Make the kernels that a GPU would run for this attention, on any machine, and print what they "
        "cost: registers, spills, shared memory, instructions and loads of their main loops. They depend on the mask, "
        "the score and the dimensions, hardly on the lengths.",
        epilog=LANGUAGE,
    )
    names = ", ".join(TARGETS)
    parser.add_argument("--target", default="sm_90", metavar="GPU", help=f"one of {names} (default sm_90), or cpu: C++")
    add_batch_options(parser, LENGTHS)
    parser.add_argument("--kv-heads", type=whole(1, 1024), help="key/value heads G (default: as many as --heads)")
    parser.add_argument("--dim", type=whole(1, 2**16), default=64, help="head dimension D (default 64)")
    parser.add_argument("--value-dim", type=whole(1, 2**16), help="value dimension E (default: as --dim)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of q, k and v (default bf16)")
    parser.add_argument("--forward-only", action="store_true", help="leave the backward out")
    parser.add_argument("--learned", action="store_true", help="the score's tensors are learned: they need gradients")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a kernel option of FlexAttention such as BLOCK_M=64 or bwd_num_warps=8; may be given more than once",
    )
    parser.add_argument("--save", metavar="DIR", help="write the report and all code into this folder")
    parser.add_argument(
        "--simulate",
        nargs="?",
        type=whole(1, 2**16),
        const=SIMULATED,
        metavar="TOKENS",
        help="run the kernels in Triton's interpreter on random inputs and compare them with the reference; as this is "
        f"slow, the longest segments are cut until TOKENS are left (default {SIMULATED})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.set_defaults(run=run)


@dataclass(frozen=True, eq=False)
class Request:
    """Parsed arguments of ``flexjag compile``.

    Attributes:
        lengths: Segment lengths.
        kv_lengths: Segment lengths of keys and values; None if equal to `lengths`.
        mask: The mask.
        score: The score, or None.
        heads: Query heads H and key/value heads G.
        dims: Head dimension D and value dimension E.
        dtype: Dtype of q, k and v.
        options: FlexAttention's kernel options.
    """

    lengths: list[int]
    kv_lengths: list[int] | None
    mask: Mask
    score: Score | None
    heads: tuple[int, int]
    dims: tuple[int, int]
    dtype: torch.dtype
    options: dict[str, Any]


def run(args: argparse.Namespace) -> int:
    """Make the kernels and print the report, or its facts as JSON.

    Returns:
        0, or 1 if simulated kernels differ from the reference.

    Raises:
        CommandError: If an option cannot be read, or they do not fit together.
        FlexjagError: If there is no such target, or the kernels cannot be made.
        OSError: If the folder cannot be written to.
    """
    from flexjag.codegen.compile import check_support, compile_for

    if args.target == "cpu":
        return _run_cpu(args)
    check_support(get_target(args.target))
    request, backward = read_request(args), not args.forward_only
    with progress(3 if args.simulate else 2, quiet=args.json) as say:
        say("planning")
        planned = make_plan(request, torch.zeros)
        if args.save is not None:  # before the long part, so that a folder that cannot be made is told at once
            Path(args.save).mkdir(parents=True, exist_ok=True)
        say(f"making kernels for {args.target}")
        report = compile_for(args.target, *planned, backward=backward, kernel_options=request.options)
        if args.save is not None:
            report.save(args.save)
        if args.simulate:
            say(f"simulating {args.simulate} tokens at most")
        found = _simulate(args.target, request, args.simulate, backward) if args.simulate else None
    if args.json:
        print(json.dumps({**json.loads(report.to_json(None)), "simulated": found}))
    else:
        _print(report, args.save, found)
    if found is None or found["passed"]:
        return 0
    print(f"flexjag: {' '.join(found['error'].split())}", file=sys.stderr)
    return 1


def _run_cpu(args: argparse.Namespace) -> int:
    """Print the C++ of a plan and how fast it runs here."""
    from flexjag.cli.compile_cpu import measure, show

    for option, given in (("--simulate", args.simulate), ("--option", args.option), ("--learned", args.learned)):
        if given:
            raise CommandError(f"{option}: is for GPUs; the kernels of --target cpu run on this machine")
    generator = torch.Generator().manual_seed(args.seed)
    planned = make_plan(read_request(args), lambda *shape, dtype: torch.randn(*shape, generator=generator).to(dtype))
    if args.save is not None:
        Path(args.save).mkdir(parents=True, exist_ok=True)
    with progress(1, quiet=args.json) as say:
        say("compiling and timing")
        found = measure(*planned, backward=not args.forward_only)
    show(found, args.json, args.save)
    return 0


def read_request(args: argparse.Namespace) -> Request:
    """Parse the command's options.

    Raises:
        CommandError: If an option cannot be read, or options do not fit together.
    """
    lengths = parse_lengths(args.lengths, args.seed, "--lengths")
    kv_lengths = parse_lengths(args.kv_lengths, args.seed + 1, "--kv-lengths") if args.kv_lengths is not None else None
    mask, score = read_mask(args)
    heads, dims = (args.heads, args.kv_heads or args.heads), (args.dim, args.value_dim or args.dim)
    for option, given, wide in (
        ("--lengths", lengths, heads[0] * max(dims)),
        ("--kv-lengths", lengths if kv_lengths is None else kv_lengths, heads[1] * max(dims)),
    ):
        if not 1 <= sum(given) <= MOST_ELEMENTS // wide:
            most = f"{MOST_ELEMENTS // wide} tokens in all for these heads and dimensions"
            raise CommandError(f"{option}: expected 1 to {most} (kernels hardly depend on them), got {sum(given)}")
    if args.learned:
        if args.forward_only or not tensors(score):
            raise CommandError("--learned: needs a score that holds tensors, such as alibi, and a backward")
        for x in tensors(score):
            x.requires_grad_()
    return Request(lengths, kv_lengths, mask, score, heads, dims, DTYPES[args.dtype], parse_options(args.option))


def parse_options(texts: list[str]) -> dict[str, Any]:
    """Parse FlexAttention's kernel options.

    Args:
        texts: ``NAME=VALUE`` each, the name with ``fwd_`` or ``bwd_`` before it if it is for one pass alone.

    Raises:
        CommandError: If an option is unknown, or its value has the wrong type.

    >>> parse_options(["BLOCK_M=64", "bwd_num_warps=8", "PRESCALE_QK=true"])
    {'BLOCK_M': 64, 'bwd_num_warps': 8, 'PRESCALE_QK': True}
    """
    from torch.nn.attention.flex_attention import FlexKernelOptions

    kinds = typing.get_type_hints(FlexKernelOptions)
    found = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        bare = re.sub("^(fwd|bwd)_", "", name)
        if bare not in kinds:
            near = difflib.get_close_matches(bare, kinds, 1, 0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise CommandError(f"--option: {name!r} is no kernel option; {hint}known: {', '.join(kinds)}")
        found[name] = _parse_value(name, value, kinds[bare])
    return found


def _parse_value(name: str, text: str, kind: Any) -> Any:
    if kind is int:
        if text.isdecimal() and 0 < int(text) < 2**31:
            return int(text)
        what = "a positive whole number"
    else:
        values: dict[str, Any] = (
            {"true": True, "false": False} if kind is bool else {x: x for x in typing.get_args(kind)}
        )
        if text in values:
            return values[text]
        what = f"one of {', '.join(values)}"
    raise CommandError(f"--option: {name} must be {what}, got {text!r}")


def make_plan(request: Request, fill: Callable[..., torch.Tensor]) -> tuple[Plan, Jagged, Jagged, Jagged]:
    """Return the plan, q, k and v. `fill` makes a tensor from a shape and a dtype, such as ``torch.zeros``."""
    kv_lengths = request.lengths if request.kv_lengths is None else request.kv_lengths
    q, k, v = (
        Jagged.from_lengths(fill(sum(lengths), heads, dim, dtype=request.dtype), lengths)
        for lengths, heads, dim in (
            (request.lengths, request.heads[0], request.dims[0]),
            (kv_lengths, request.heads[1], request.dims[0]),
            (kv_lengths, request.heads[1], request.dims[1]),
        )
    )
    made = plan(q, None if request.kv_lengths is None else k, mask=request.mask, score=request.score)
    return made, q, k, v


def shorten(lengths: list[int], tokens: int) -> list[int]:
    """Cut the longest segments so that at most `tokens` remain; the short ones stay as they are.

    Raises:
        CommandError: If there are more segments than tokens.

    >>> shorten([700, 0, 20, 500], 100)
    [40, 0, 20, 40]
    """
    low, high = 0, max(lengths)
    while low < high:
        longest = (low + high + 1) // 2
        low, high = (longest, high) if sum(min(n, longest) for n in lengths) <= tokens else (low, longest - 1)
    if not low:
        raise CommandError(f"--simulate: expected at most {tokens} segments for {tokens} tokens, got {len(lengths)}")
    return [min(n, low) for n in lengths]


def _simulate(target: str, request: Request, tokens: int, backward: bool) -> dict[str, Any]:
    """Compare the same kernels with the reference on a small batch of random numbers."""
    from flexjag.testing.kernels import assert_kernels_match

    kv_lengths = None if request.kv_lengths is None else shorten(request.kv_lengths, tokens)
    small = replace(request, lengths=shorten(request.lengths, tokens), kv_lengths=kv_lengths)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    made, q, k, v = make_plan(small, random)
    ratios, error = {}, None
    try:
        ratios = assert_kernels_match(made, q, k, v, target=target, backward=backward, kernel_options=request.options)
    except AssertionError as wrong:
        error = str(wrong)
    return {
        "lengths": small.lengths,
        "kv_lengths": kv_lengths,
        "passed": error is None,
        "error": error,
        "error_over_allowed": ratios,
    }


def _print(report: Report, folder: str | None, simulated: dict[str, Any] | None) -> None:
    print(report)
    if folder is not None:
        print(f"saved in {folder}")
    if simulated is None:
        return
    lengths = simulated["lengths"]
    which = f"segments of {', '.join(map(str, lengths))}" if len(lengths) <= 16 else f"{len(lengths)} segments"
    print(f"simulated on {sum(lengths)} random tokens in {which}, few because it is slow; error over allowed error:")
    for name, ratio in simulated["error_over_allowed"].items():
        print(f"  {name}: {ratio:.2g}")
    print("  agrees with the reference" if simulated["passed"] else "  DIFFERS FROM THE REFERENCE")
