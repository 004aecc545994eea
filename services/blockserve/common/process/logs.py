"""Log lines: for people on a terminal, or one JSON object each for machines."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from blockserve.common.errors import ConfigurationError

OWN_LOGGERS = ("blockserve", "blockzoo", "blockkernels")


class TextFormatter(logging.Formatter):
    """`2026-11-23T20:45:32.123Z INFO router.service request id=… outcome=finished`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(shortname)s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """UTC, to the millisecond."""
        del datefmt
        moment = datetime.fromtimestamp(record.created, UTC)
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback follows on lines of its own."""
        record.shortname = record.name.removeprefix("blockserve.")
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One object per line: time (seconds since 1970), level, logger, message, and exception if any."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure_logging(level: str, form: Literal["text", "json"], file: Path | None = None) -> None:
    """Send all log lines of this process to standard error, or to a file.

    Libraries are heard from `warning` on, or when everything is wanted (`debug`).

    Args:
        level: lowest level of our own lines.
        form: lines for people, or JSON objects.
        file: appended to; only the user can read it.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    handler = logging.StreamHandler() if file is None else _open(file)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    wanted = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(wanted if wanted <= logging.DEBUG else max(wanted, logging.WARNING))
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(wanted)


def _open(file: Path) -> logging.StreamHandler[Any]:
    try:
        descriptor = os.open(file.expanduser(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise ConfigurationError(f"the log {file} cannot be written: {error.strerror}", path=file) from error
    # Lives as long as the process.
    return logging.StreamHandler(open(descriptor, "a", encoding="utf-8", buffering=1))  # noqa: PTH123
