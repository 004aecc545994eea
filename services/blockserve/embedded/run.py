"""Running the embedded server until it is told to stop."""

from __future__ import annotations

from collections.abc import Callable

from blockserve.common.process import run as runner
from blockserve.embedded.server import EmbeddedServer
from blockserve.embedded.settings import EmbeddedSettings
from blockserve.embedded.startup import Parts


def run(
    settings: EmbeddedSettings,
    *,
    parts: Parts | None = None,
    on_ready: Callable[[EmbeddedServer], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; see `blockserve.common.process.run`.

    Args:
        settings: of the process.
        parts: instead of the real zoo and engine.
        on_ready: called once the server says SERVING, for example to print its address.
    """
    runner.run(settings, EmbeddedServer(settings, parts=parts), on_ready)
