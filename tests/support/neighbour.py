"""One of our services as a neighbouring release would be; run as a program, never imported by it.

    python neighbour.py MODULE [--wire N] [--unknown-after FRAMES] [--engine-ends-after PASSES]

`--wire` compiles the module that defines the wire version with another number, before anything reads it.
`--unknown-after` has a worker say one thing that this version does not know, once, after so many frames.
`--engine-ends-after` has what runs a worker's passes end by a fault that no request caused.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CLUSTER = "blockserve.common.api.cluster"
UNKNOWN_FIELD = b"\xfa\x06\x02\x08\x01"
"""A message in field 111, which no version has."""


def launcher(*options: str) -> tuple[str, ...]:
    """What stands between `python` and the module's name for such a process."""
    return (str(Path(__file__)), *options)


def speak(wire: int) -> None:
    """Have every module of this process believe in another wire version."""
    spec = importlib.util.find_spec(CLUSTER)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    changed, count = re.subn(r"^WIRE_VERSION = \d+$", f"WIRE_VERSION = {wire}", source, flags=re.MULTILINE)
    assert count == 1
    module = sys.modules[CLUSTER] = importlib.util.module_from_spec(spec)
    exec(compile(changed, spec.origin, "exec"), vars(module))
    importlib.import_module("blockserve.common.api").cluster = module  # type: ignore[attr-defined]


def say_something_unknown(after: int) -> None:
    """Add a message that this version does not know to one frame of a worker."""
    streams: Any = importlib.import_module("blockserve.worker.peers.streams")
    to_frame, numbers = streams.to_frame, itertools.count()

    def newer(messages: Sequence[Any]) -> Any:
        frame = to_frame(messages)
        if next(numbers) == after:
            frame.messages.add().MergeFromString(UNKNOWN_FIELD)
        return frame

    streams.to_frame = newer


def end_engine(after: int) -> None:
    """Have the driver of a worker's engine fail between two passes."""
    passes: Any = importlib.import_module("blockserve.worker.engine.passes").Passes
    plan, numbers = passes.plan, itertools.count()

    def failing(self: Any) -> Any:
        work = plan(self)
        if work is not None and next(numbers) == after:
            raise MemoryError("between two passes")
        return work

    passes.plan = failing


def main() -> None:
    """Run the service in this process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--wire", type=int)
    parser.add_argument("--unknown-after", type=int)
    parser.add_argument("--engine-ends-after", type=int)
    parser.add_argument("module")
    wanted = parser.parse_args()
    if wanted.wire is not None:
        speak(wanted.wire)
    if wanted.unknown_after is not None:
        say_something_unknown(wanted.unknown_after)
    if wanted.engine_ends_after is not None:
        end_engine(wanted.engine_ends_after)
    sys.argv[1:] = []
    runpy.run_module(wanted.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
