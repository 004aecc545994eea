"""The command `blockzoo`.

Rule of this package: a module imports only the standard library and typer at its top. Everything else is
imported by the verb that needs it, so that a help text or `blockzoo ls` never waits for gRPC or torch.
"""

from __future__ import annotations

from blockserve.cli.main import main

__all__ = ["main"]
