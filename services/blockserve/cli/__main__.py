"""`python -m blockserve.cli` is `blockzoo`."""

from __future__ import annotations

import sys

from blockserve.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
