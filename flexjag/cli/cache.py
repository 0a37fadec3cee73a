"""``flexjag cache``: list the caches on disk with their sizes and limits, or clear them."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from flexjag import caches
from flexjag.cli.options import human_bytes

if TYPE_CHECKING:
    from flexjag.cli.options import Commands


def add_command(commands: Commands) -> None:
    """Register the command and its options."""
    kept = [name for name, cache in caches.CACHES.items() if not cache.limited]
    parser = commands.add_parser(
        "cache",
        help="show or remove what is kept on disk",
        description="Show what flexjag keeps on disk between runs, or remove it.",
        epilog=f"{caches.FOLDER} names another folder, {caches.LIMIT} how many MB each cache may take (default "
        f"{caches.DEFAULT_MB:.0f}): beyond it, what was not used for longest is removed.",
    )
    parser.add_argument(
        "--clear",
        nargs="*",
        choices=list(caches.CACHES),
        metavar="CACHE",
        help=f"remove {', '.join(caches.CACHES)}; if none is named, all but what was measured ({', '.join(kept)})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Clear the requested caches, and print those that remain.

    Raises:
        CacheError: If the limit in the environment is no number.
        OSError: If a file cannot be read or removed.
    """
    removed = 0
    if args.clear is not None:
        removed = caches.clear(*(args.clear or [name for name, cache in caches.CACHES.items() if cache.limited]))
    most = caches.limit()
    found = {}
    for name, cache in caches.CACHES.items():
        sizes = [path.stat().st_size for path in cache.files()]
        found[name] = {"files": len(sizes), "bytes": sum(sizes), "limit_bytes": most if cache.limited else None}
    if args.json:
        print(json.dumps({"folder": str(caches.folder()), "removed": removed, "caches": found}))
        return 0
    if args.clear is not None:
        print(f"removed {removed} file{'' if removed == 1 else 's'}")
    print(caches.folder())
    for name, x in found.items():
        limit = "" if x["limit_bytes"] is None else f" of at most {human_bytes(x['limit_bytes'])}"
        number = f"{x['files']} file{'' if x['files'] == 1 else 's'}"
        print(f"  {name:<8} {number:>11}, {human_bytes(x['bytes'])}{limit}: {caches.CACHES[name].about}")
    return 0
