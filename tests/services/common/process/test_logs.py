"""Log lines: readable, or one JSON object each."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

import pytest

from blockserve.common.process.logs import configure_logging


@pytest.fixture(autouse=True)
def _restore_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_text_lines_have_time_level_place_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "text")
    logging.getLogger("blockserve.router.service").info("request id=%s", "x1")
    logging.getLogger("blockserve.router.service").debug("not wanted")
    line = capsys.readouterr().err
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO router\.service request id=x1\n", line)


def test_json_lines_are_objects_with_the_traceback_inside(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("warning", "json")
    try:
        raise ZeroDivisionError("oops")
    except ZeroDivisionError:
        logging.getLogger("blockserve.x").exception("failed \N{LATIN SMALL LETTER U WITH DIAERESIS}\nsecond")
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["logger"], entry["message"]) == (
        "error",
        "blockserve.x",
        "failed ü\nsecond",
    )
    assert "ZeroDivisionError: oops" in entry["exception"]
