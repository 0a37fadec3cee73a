"""``python -m flexjag.codegen docs/kernels.md``: write the page of kernels."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flexjag.codegen.show.own_page import LISTINGS, build_section, put_section
from flexjag.codegen.show.page import build


def main(arguments: list[str]) -> int:
    """Write the page to the given path, or update only one of its sections on our own kernels there."""
    parser = argparse.ArgumentParser("python -m flexjag.codegen", description="Write the page of kernels.")
    parser.add_argument("path", type=Path, metavar="PAGE.md")
    parser.add_argument("--own", choices=LISTINGS, help="only this section on our own kernels; the rest stays")
    args = parser.parse_args(arguments)

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    page = args.path.read_text(encoding="utf-8") if args.own else build(progress)
    for name in [args.own] if args.own else LISTINGS:
        page = put_section(page, name, build_section(name, progress))
    args.path.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
