"""`python -m blockserve.controller`: one controller, with settings from the environment and a file."""

from __future__ import annotations

import sys

from blockserve.common.process.run import run
from blockzoo.errors import BlockzooError


def main() -> int:
    """Run until told to stop; the exit status."""
    try:
        from blockserve.controller.server import ControllerServer
        from blockserve.controller.settings import ControllerSettings

        settings = ControllerSettings.load()
        run(settings, ControllerServer(settings), lambda server: print(f"ready {server.address}", flush=True))  # noqa: T201
    except BlockzooError as error:
        sys.stderr.write(f"error: {error}\n{error.hint}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
