"""``python -m flexjag.bench``."""

import sys

from flexjag.bench.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
