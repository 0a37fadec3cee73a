"""``flexjag explain``: plan a batch given by its lengths, and print its explanation."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

import torch

from flexjag.api.explain import facts
from flexjag.api.plan import plan
from flexjag.cli.options import LANGUAGE, add_batch_options, parse_lengths, progress, read_mask, whole
from flexjag.jagged import Jagged

if TYPE_CHECKING:
    from flexjag.cli.options import Commands


def add_command(commands: Commands) -> None:
    """Register the command and its options."""
    parser = commands.add_parser(
        "explain",
        help="print the plan for lengths and a mask",
        description="Plan attention over a jagged batch and print what was decided and why.",
        epilog=LANGUAGE,
    )
    add_batch_options(parser)
    parser.add_argument("--dim", type=whole(1, 2**16), default=64, help="head dimension D (default 64)")
    parser.add_argument("--block", type=whole(16, 2**16), default=128, help="tile size, a power of two (default 128)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the explanation, or its facts as JSON.

    Raises:
        CommandError: If the lengths, the mask or the score cannot be read.
        FlexjagError: If they do not fit together.
    """
    lengths = parse_lengths(args.lengths, args.seed, "--lengths")
    kv_lengths = parse_lengths(args.kv_lengths, args.seed + 1, "--kv-lengths") if args.kv_lengths is not None else None
    mask, score = read_mask(args)
    with progress(1, quiet=args.json) as say:
        say(f"planning {sum(lengths)} tokens")
        q = _batch(lengths, args.heads, args.dim)
        k = None if kv_lengths is None else _batch(kv_lengths, args.heads, args.dim)
        made = plan(q, k, mask=mask, score=score, block_size=args.block)
        text = json.dumps(facts(made)) if args.json else made.explain()
    print(text)
    return 0


def _batch(lengths: list[int], heads: int, dim: int) -> Jagged:
    """A batch of zeros that takes the memory of a single number: planning reads only its shape."""
    return Jagged.from_lengths(torch.zeros(1, 1, 1).expand(sum(lengths), heads, dim), lengths)
