"""Log lines: readable, or one JSON object each."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockserve.common.errors import ConfigurationError
from blockserve.common.process.logs import OWN_LOGGERS, configure_logging


@pytest.fixture(autouse=True)
def _restore_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, levels = (
        list(root.handlers),
        {name: logging.getLogger(name).level for name in ("", *OWN_LOGGERS)},
    )
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


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


@pytest.mark.parametrize(("level", "heard"), [("info", ["WARNING"]), ("debug", ["INFO", "WARNING"])])
def test_libraries_are_heard_from_warnings_on(
    capsys: pytest.CaptureFixture[str], level: str, heard: list[str]
) -> None:
    configure_logging(level, "text")
    logging.getLogger("somelib.part").info("cache stats")
    logging.getLogger("somelib.part").warning("trouble")
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == heard


def test_a_log_file_takes_the_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "serve.log"
    for _ in range(2):  # a process that is started again goes on in the same file
        configure_logging("info", "text", file)
        logging.getLogger("blockserve.router").info("ready")
    assert capsys.readouterr().err == ""
    assert len(file.read_text().splitlines()) == 2
    assert file.stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigurationError, match="cannot be written: No such file"):
        configure_logging("info", "text", tmp_path / "none" / "serve.log")
