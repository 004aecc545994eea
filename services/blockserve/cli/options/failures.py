"""How a command fails: exit codes, and what is printed.

====  ==========================================================
code  meaning
====  ==========================================================
0     done
1     failed: the input was refused, or something is not possible
2     the command line or the configuration is wrong
3     a variant, version or zoo that was named does not exist
4     somebody else changed the same thing; trying again may work
5     stored bytes are damaged or missing
130   interrupted with Ctrl-C
====  ==========================================================
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from blockserve.cli.views.plain import visible, visible_json

FAILURE = 1
USAGE = 2
NOT_FOUND = 3
CONFLICT = 4
CORRUPTION = 5
INTERRUPTED = 130


def exit_code(error: BaseException) -> int:
    """The code for an error; the table is in the module docstring."""
    from blockserve.common.errors import ConfigurationError
    from blockzoo import errors

    # A manifest names these, so their absence is damage and not a wrong name.
    if isinstance(error, errors.CorruptionError | errors.BlobNotFoundError | errors.ManifestNotFoundError):
        return CORRUPTION
    if isinstance(error, errors.NotFoundError):
        return NOT_FOUND
    if isinstance(error, errors.ConflictError):
        return CONFLICT
    if isinstance(error, ConfigurationError):
        return USAGE
    return FAILURE


def report(error: Exception, *, as_json: bool = False) -> int:
    """Print the error on stderr, as a sentence and a hint or as one JSON object; return its exit code."""
    from blockzoo.errors import BlockzooError

    if isinstance(error, BlockzooError):
        reason, message, hint, metadata = error.reason, str(error), error.hint, dict(error.metadata)
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        reason, message, hint, metadata = "OS", f"{where}{error.strerror or error}", "", {}
    else:
        reason, metadata = "INTERNAL", {}
        message = f"internal error: {type(error).__name__}: {error}"
        hint = "This is a bug in blockzoo: run the command again with --debug and report the output."
    show(reason, message, hint, metadata, as_json=as_json)
    return exit_code(error)


def show(reason: str, message: str, hint: str, metadata: Mapping[str, str], *, as_json: bool) -> None:
    """Print an error on stderr, as a sentence and a hint or as one JSON object."""
    if as_json:
        value = {"reason": reason, "message": message, "hint": hint, "metadata": dict(metadata)}
        sys.stderr.write(visible_json({"error": value}) + "\n")
    else:
        _print(message, hint)


def _print(message: str, hint: str) -> None:
    try:
        from rich.text import Text
    except ModuleNotFoundError:
        # A bare install, which is the client and not the command.
        sys.stderr.write(visible(f"Error: {message}\n{hint}".rstrip()) + "\n")
        return
    from blockserve.cli.views.tables import fold, note, stderr

    console = stderr()
    lines = fold(f"Error: {message}", console.width if console.is_terminal else None)
    console.print(Text("\n".join(lines), style="bold red"), soft_wrap=True)
    if hint:
        note(hint)
