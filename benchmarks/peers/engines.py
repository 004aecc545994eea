"""What answers requests: our server over gRPC, and peers in child processes of their own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from harness import CACHE, CheckFailedError
from peers.workload import Answer, Batch, Request, batch_from_json
from served import Server, run_client, serve

from blockserve.client.blocking import AsyncClient
from blockserve.common.api.results import Completion

HERE = Path(__file__).resolve().parent
TICKS = os.sysconf("SC_CLK_TCK")
OURS_ENVIRONMENT = ("OMP_NUM_THREADS", "PYTHONPATH")
"""Of a developer's shell; peers start without, so that they get every core and find their own packages."""


class Measured(Protocol):
    """Processes that are measured while others are idle."""

    @property
    def name(self) -> str:
        """As result files call it."""
        ...

    def cpu_seconds(self) -> float:
        """Processor time its processes have used so far."""
        ...


class Engine(Measured, Protocol):
    """Answers requests, all sent at once."""

    def run(self, requests: Sequence[Request]) -> Batch:
        """Send all requests at once and wait for all answers."""
        ...


class Ours:
    """`blockzoo serve` as a process of its own; its client, here, is another."""

    name = "blockzoo"

    def __init__(self, server: Server) -> None:
        """Ask `server`."""
        self.server = server

    def run(self, requests: Sequence[Request]) -> Batch:
        """See `Engine`; the connection is open before the clock starts."""

        async def body(client: AsyncClient) -> Batch:
            await client.wait_ready(30)
            return await ask(client, requests)

        return run_client(self.server.address, body)

    def alone(self, request: Request, logprobs: int) -> Completion:
        """One answer with nothing else in flight, with its log-probabilities."""

        async def body(client: AsyncClient) -> Completion:
            return await client.generate(
                request.model,
                request.prompt,
                temperature=0,
                max_tokens=request.tokens,
                ignore_eos=True,
                logprobs=logprobs,
            ).result()

        return run_client(self.server.address, body)

    def cpu_seconds(self) -> float:
        """See `Engine`."""
        return session_cpu_seconds(self.server.pid)


async def ask(client: AsyncClient, requests: Sequence[Request]) -> Batch:
    """Send all requests at once and wait for all answers."""
    began = time.monotonic()
    answers = await asyncio.gather(*(_one(client, request, began) for request in requests))
    return Batch(time.monotonic() - began, tuple(answers))


async def _one(client: AsyncClient, request: Request, began: float) -> Answer:
    first = last = 0.0
    tokens: list[int] = []
    answer = client.generate(
        request.model, request.prompt, temperature=0, max_tokens=request.tokens, ignore_eos=True
    )
    async for chunk in answer:
        if chunk.token_ids:
            last = time.monotonic() - began
            first = first or last
            tokens.extend(chunk.token_ids)
    return Answer(first, last, tuple(tokens))


@contextmanager
def our_server(zoo: Path, *options: str) -> Iterator[Ours]:
    """Our server over a zoo."""
    with serve(zoo, *options) as server:
        yield Ours(server)


class Child:
    """A peer in a child process that answers JSON lines; `vllm_child` says which."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: Path) -> None:
        """Talk to a process that has been started; `wait_ready` comes before anything else."""
        self.name = name
        self._process = process
        self._log = log

    def wait_ready(self) -> float:
        """Return when it can answer; the seconds its engine took to start."""
        seconds: float = self._read()["seconds"]
        return seconds

    def run(self, requests: Sequence[Request]) -> Batch:
        """See `Engine`."""
        return batch_from_json(self._ask({"requests": [_in_json(request) for request in requests]}))

    def use_weights(self, folder: Path) -> float:
        """Go on with another checkpoint of the same architecture; the seconds it took."""
        seconds: float = self._ask({"weights": str(folder)})["seconds"]
        return seconds

    def begin_serving(self) -> None:
        """From now on requests join and leave its batch one by one: `send` and `receive`, nothing else."""
        self._write({"serve": True})

    def send(self, number: int, request: Request) -> None:
        """Hand in a request."""
        self._write({"number": number, **_in_json(request)})

    def receive(self) -> tuple[int, list[int]]:
        """Wait for the next request that ends: its number and its tokens."""
        ended = self._read()
        return ended["number"], ended["tokens"]

    def cpu_seconds(self) -> float:
        """See `Engine`."""
        return session_cpu_seconds(self._process.pid)

    def resident_bytes(self) -> int:
        """Proportional share of the process's resident memory (`Pss` in /proc/PID/smaps_rollup)."""
        return proportional_bytes(self._process.pid)

    def _ask(self, task: Mapping[str, Any]) -> dict[str, Any]:
        self._write(task)
        return self._read()

    def _write(self, task: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CheckFailedError(
                f"{self.name} ended: {self._log.read_text(errors='replace')[-2000:]}",
            )
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextmanager
def child(
    name: str, python: Path, script: str, options: Mapping[str, Any], environment: Mapping[str, str]
) -> Iterator[Child]:
    """A peer's process, which starts while the caller goes on; ended whatever happens."""
    log = CACHE / f"bench-{Path(script).stem}.log"
    inherited = {key: value for key, value in os.environ.items() if key not in OURS_ENVIRONMENT}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(python), str(HERE / script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env={**inherited, **environment},
            start_new_session=True,
            text=True,
        )
    try:
        yield Child(name, process, log)
    finally:
        process.kill()
        process.wait()


def session_cpu_seconds(leader: int) -> float:
    """Processor time of all live processes of a session (a process started as its leader, and its own)."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if int(fields[3]) == leader:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def proportional_bytes(pid: int) -> int:
    """Resident memory of a process, pages shared with others counted by their share."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    (line,) = (line for line in rollup.splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) * 1024


def _in_json(request: Request) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        "tokens": request.tokens,
        "adapter": str(request.folder) if request.folder else None,
    }
