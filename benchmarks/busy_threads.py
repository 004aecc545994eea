"""busy-threads: 40 tokens of SmolLM2 with default settings, over the same with a fixed number of threads.

In the row busy-threads every core is also used by another program, and the peer computes with one thread.
In quiet-threads nothing else runs, and the peer is the best fixed number. Servers with the settings in
question run side by side and are asked in turns; one that is not asked does nothing.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

from cluster import answer, base_model, make_zoo, row
from harness import Row
from program import Bar, Program, Say, Scale
from served import serve

from blockserve.client.aio import AsyncClient

TOKENS = 40
SETTLE_SECONDS = 3.0
"""After other programs start or end: longer than the server takes to notice."""
PROMPT = tuple(range(20, 40))


async def measure(scale: Scale, say: Say) -> list[Row]:
    """Busy, then quiet, each in turns."""
    zoo = make_zoo("busy-threads-zoo", {"base": base_model(quick=scale.quick)})
    cores = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        servers = {"default": stack.enter_context(serve(zoo, "--preload", "base"))}
        for count in sorted({1, max(1, cores // 2), cores}):
            options = ("--preload", "base", "--num-threads", str(count))
            servers[str(count)] = stack.enter_context(serve(zoo, *options))
        clients = {name: AsyncClient(server.address) for name, server in servers.items()}
        with _others(cores):
            busy = await _in_turns({name: clients[name] for name in ("default", "1")}, scale, say)
        quiet = await _in_turns(clients, scale, say)
        for client in clients.values():
            await client.close()
    best = min((name for name in clients if name != "default"), key=lambda name: median(quiet[name]))
    case = f"seconds for {TOKENS} greedy tokens, default settings"
    return [
        row(
            "busy_threads",
            "busy-threads",
            f"{case}, all {cores} cores taken by another program",
            "s",
            busy["default"],
            peer=busy["1"],
            peer_name="--num-threads 1",
        ),
        row(
            "busy_threads",
            "quiet-threads",
            f"{case}, nothing else runs",
            "s",
            quiet["default"],
            peer=quiet[best],
            peer_name=f"--num-threads {best}, the best fixed number",
        ),
    ]


async def _in_turns(clients: dict[str, AsyncClient], scale: Scale, say: Say) -> dict[str, list[float]]:
    await asyncio.sleep(SETTLE_SECONDS)
    samples: dict[str, list[float]] = {name: [] for name in clients}
    for client in clients.values():
        await answer(client, "base", PROMPT, 2)
    for number in range(scale.runs):
        for name, client in clients.items():
            started = time.perf_counter()
            await answer(client, "base", PROMPT, 4 if scale.quick else TOKENS)
            samples[name].append(time.perf_counter() - started)
        say(f"run {number + 1}: " + ", ".join(f"{name} {taken[-1]:.2f} s" for name, taken in samples.items()))
    return samples


@contextmanager
def _others(count: int) -> Iterator[None]:
    """So many programs that do nothing but compute."""
    command = [sys.executable, "-c", "while True: pass"]
    programs = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


PROGRAM = Program(
    "busy-threads",
    "default threads on cores that others use, and on quiet ones",
    measure,
    (Bar("busy-threads", 1.3, at_most=True), Bar("quiet-threads", 1.05, at_most=True)),
)
BENCHMARK = PROGRAM.benchmark

if __name__ == "__main__":
    sys.exit(PROGRAM.main())
