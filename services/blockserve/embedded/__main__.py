"""`python -m blockserve.embedded`: serve, with settings from the environment and a file."""

from __future__ import annotations

import sys


def main() -> int:
    """Exit status 0 after a stop, 1 when the server could not start, 130 when interrupted before it could."""
    try:
        from blockserve.embedded.run import run
        from blockserve.embedded.settings import EmbeddedSettings
        from blockzoo.errors import BlockzooError
    except KeyboardInterrupt:
        return 130
    try:
        run(EmbeddedSettings.load())
    except BlockzooError as error:
        sys.stderr.write(f"error: {error}\n{error.hint}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
