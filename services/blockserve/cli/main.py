"""Entry point: runs the app and turns whatever goes wrong into one sentence and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

DEBUG_VARIABLE = "BLOCKZOO_DEBUG"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return its exit code (see `blockserve.cli.options.failures`)."""
    arguments, debug = _take_debug(list(sys.argv[1:] if argv is None else argv))
    if not debug:
        # gRPC's C core writes past our log; what matters of it comes as an error as well.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if argv is None and arguments[:1] in (["serve"], ["worker"]) and not {"-h", "--help"} & set(arguments):
        _begin_loading_torch()
    # Leaving by exception ends without running what would print tracebacks over the message.
    try:
        from blockserve.cli.app import build_app

        code = build_app(arguments)(args=arguments, prog_name="blockzoo", standalone_mode=False)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        from blockserve.cli.options.usage import is_usage_error

        if debug and not is_usage_error(error):
            raise
        return _report(error, as_json="--json" in arguments)
    if code == 130:
        sys.stderr.write("Interrupted.\n")
    return code or 0


def _report(error: Exception, *, as_json: bool) -> int:
    from blockserve.cli.options.failures import report
    from blockserve.cli.options.usage import is_usage_error, report_usage
    from blockzoo.extras import missing_package

    if is_usage_error(error):
        return report_usage(error, as_json=as_json)
    if type(error).__name__ == "Abort":  # typer's for the end of what is typed
        sys.stderr.write("Aborted.\n")
        return 1
    if isinstance(error, ModuleNotFoundError):
        error = missing_package(error) or error
    return report(error, as_json=as_json)


def _begin_loading_torch() -> None:
    """Start the longest part of a server's start before anything else is imported.

    Importing makes objects that live as long as the process, so looking for garbage meanwhile is time
    lost (8 % of the import of torch); the server turns the collector on again when it is ready.
    """
    import gc
    import importlib
    import threading
    from contextlib import suppress

    def load() -> None:
        # Without torch the verb fails by itself, and names the extra that brings it.
        with suppress(ImportError):
            importlib.import_module("torch")

    gc.disable()
    threading.Thread(target=load, daemon=True).start()


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """`--debug` is allowed anywhere before `--`, so that a failed command is repeated by adding it."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    head = [word for word in arguments[:end] if word != "--debug"]
    debug = len(head) < end or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    return head + arguments[end:], debug
