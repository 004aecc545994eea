"""Show pip's output as one moving line, keep all of it in a log, print its errors.

Reads pip's output on stdin. On a terminal the line moves; elsewhere a plain line comes every ten seconds.
Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import re
import shutil
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

PLAIN_INTERVAL_S = 10.0
MOVING_INTERVAL_S = 0.2
_SIZE = re.compile(r"\(([\d.]+) (kB|MB|GB)\)")
_UNIT_MB = {"kB": 0.001, "MB": 1.0, "GB": 1000.0}
_FETCHED = ("Downloading ", "Using cached ", "Processing ")


@dataclass
class State:
    """What pip has done so far."""

    started: float
    packages: int = 0
    megabytes: float = 0.0
    doing: str = "starting"
    errors: list[str] = field(default_factory=list)

    def read(self, line: str) -> None:
        """Take in one line of pip's output."""
        text = line.strip()
        if text.startswith("ERROR"):
            self.errors.append(text)
        elif text.startswith("Collecting "):
            self.doing = f"fetching {text.split()[1]}"
        elif text.startswith(_FETCHED):
            # Metadata files come before their wheels and are not packages.
            if ".metadata" in text:
                return
            self.packages += 1
            if size := _SIZE.search(text):
                self.megabytes += float(size[1]) * _UNIT_MB[size[2]]
        elif text.startswith("Installing collected"):
            self.doing = "unpacking"

    def describe(self, now: float) -> str:
        """One line that says how far it is."""
        fetched = f"{self.packages} packages, {self.megabytes:.0f} MB fetched"
        return f"  {now - self.started:4.0f} s  {fetched}, {self.doing}"


def main() -> int:
    """Copy stdin to the log and show progress until it ends."""
    state = State(time.monotonic())
    ended = threading.Event()
    shower = threading.Thread(target=_show, args=(state, ended, sys.stderr), daemon=True)
    shower.start()
    with Path(sys.argv[1]).open("w", encoding="utf-8") as log:
        for line in sys.stdin:
            log.write(line)
            log.flush()
            state.read(line)
    ended.set()
    shower.join()
    for error in state.errors:
        print(error, file=sys.stderr)
    return 0


def _show(state: State, ended: threading.Event, out: TextIO) -> None:
    moving = out.isatty()
    while not ended.wait(MOVING_INTERVAL_S if moving else PLAIN_INTERVAL_S):
        line = state.describe(time.monotonic())
        if moving:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{line[:width]}", end="", file=out, flush=True)
        else:
            print(line, file=out, flush=True)
    if moving:
        print("\r\033[K", end="", file=out, flush=True)


if __name__ == "__main__":
    sys.exit(main())
