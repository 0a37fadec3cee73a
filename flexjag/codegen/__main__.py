"""``python -m flexjag.codegen docs/kernels.md``: write the page of kernels."""

from __future__ import annotations

import sys
from pathlib import Path

from flexjag.codegen.tables import build


def main(arguments: list[str]) -> int:
    """Write the page to the path that is given."""
    if len(arguments) != 1:
        print("usage: python -m flexjag.codegen PATH", file=sys.stderr)
        return 2
    page = build(lambda line: print(line, file=sys.stderr, flush=True))
    Path(arguments[0]).write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
