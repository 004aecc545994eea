"""Log lines: for people on a terminal, or one JSON object each for machines. Standard library only."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Literal


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


def configure_logging(level: str, form: Literal["text", "json"]) -> None:
    """Send all log lines of this process to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
