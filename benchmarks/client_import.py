"""client-import: a program that imports the client, over one that imports grpc and protobuf's messages.

Each sample is the wall time of a process, with bytecode cached as pip leaves it. The row client-made goes on
to make a client, which loads the messages; the bar is about the import.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

from harness import CACHE, Row, check, interleave
from program import Bar, Program, Say, Scale

RUNS = 21
"""At least: a process is short beside what else a machine does."""
PEER = "import grpc, google.protobuf.message"
IMPORTED = "from blockserve import Client"
MADE = f"{IMPORTED}; Client('127.0.0.1:1').close()"
ABSENT = ("numpy", "torch", "pydantic", "blake3", "blockzoo.zoo", "blockzoo.store")


async def measure(scale: Scale, say: Say) -> list[Row]:
    """Start processes in turns."""
    environment = _environment()
    loaded = _loaded(environment)
    check(not loaded, f"the client loads {', '.join(loaded)}")
    codes = (IMPORTED, MADE, PEER)
    for code in codes:
        _seconds(code, environment)
    runs = 1 if scale.quick else max(scale.runs, RUNS)
    imported, made, peer = interleave(
        *(lambda code=code: _seconds(code, environment) for code in codes), runs=runs, say=say
    )
    return [
        _row("client-import", f"python -c {IMPORTED!r}", imported, peer),
        _row("client-made", f"python -c {MADE!r}", made, peer),
    ]


def _row(name: str, case: str, ours: list[float], peer: list[float]) -> Row:
    return Row(
        id=name,
        case=case,
        unit="s",
        command="python benchmarks/run.py --only client-import",
        ours=ours,
        peer=peer,
        peer_name=f"python -c {PEER!r}",
    )


def _environment() -> dict[str, str]:
    """Bytecode is read, and the first start of each program writes it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return environment | {"PYTHONPYCACHEPREFIX": str(CACHE / "bench" / "bytecode")}


def _seconds(code: str, environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    return time.perf_counter() - started


def _loaded(environment: dict[str, str]) -> list[str]:
    """What a client should do without, and has loaded."""
    code = f"{MADE}; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True
    )
    return sorted(set(ABSENT) & set(done.stdout.split()))


PROGRAM = Program(
    "client-import",
    "starting a program that imports the client",
    measure,
    (Bar("client-import", 1.35, 1.2, at_most=True),),
)
BENCHMARK = PROGRAM.benchmark

if __name__ == "__main__":
    sys.exit(PROGRAM.main())
