"""The processes of the cluster demo: a state server, a controller, a router and workers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from demo_variants import shared_machine
from rich.console import Console

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.common.process.redis_child import RedisChild
from blockserve.common.state.opening import open_store
from blockserve.common.state.settings import StateConfig
from blockzoo.errors import BlockzooError
from blockzoo.zoo import Zoo

START_SECONDS = 120.0


@dataclass
class _Process:
    name: str
    popen: subprocess.Popen[bytes]
    address: str = ""


class DemoCluster:
    """A cluster of processes that ends with the demo, whatever happens.

    Attributes:
        address: of the router.
    """

    def __init__(self, folder: Path, num_workers: int) -> None:
        self._folder = folder
        self._names = [f"worker-{number}" for number in range(1, num_workers + 1)]
        self._workers: dict[str, _Process] = {}
        self._others: list[_Process] = []
        self._redis: RedisChild | None = None
        self.address = ""

    async def __aenter__(self) -> Self:
        self._redis = await asyncio.to_thread(RedisChild)
        self._store = open_store(StateConfig(url=self._redis.url))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._store.close()
        processes = [*self._others, *self._workers.values()]
        for process in processes:
            process.popen.terminate()
        for process in processes:
            try:
                await asyncio.to_thread(process.popen.wait, 10)
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()
        if self._redis is not None:
            await asyncio.to_thread(self._redis.stop)

    async def start(self, console: Console) -> None:
        """Start everything; each process says where it listens."""
        controller = {"BLOCKZOO_REPLICAS": "2"}
        self._others = [
            self._spawn("controller", "controller", controller),
            self._spawn("router", "router", {}),
        ]
        for name in self._names:
            # One core each, and answers that do not depend on what else is in a batch or on where they run.
            settings = {
                "BLOCKZOO_NAME": name,
                "BLOCKZOO_ENGINE_NUM_THREADS": "1",
                "BLOCKZOO_ENGINE_DETERMINISTIC": "true",
                "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(256 << 20),
                "BLOCKZOO_DRAIN_SECONDS": "0",
            }
            self._workers[name] = self._spawn("worker", name, settings)
        for process in (*self._others, *self._workers.values()):
            await self._ready(process)
            console.print(f"  {process.name:12} pid {process.popen.pid:<8} {process.address}")
        self.address = self._others[1].address

    def _spawn(self, service: str, name: str, settings: dict[str, str]) -> _Process:
        assert self._redis is not None
        environment = {
            **shared_machine(),
            "BLOCKZOO_ZOO": str(self._folder / "zoo"),
            "BLOCKZOO_STATE_URL": self._redis.url,
            "BLOCKZOO_LISTEN": f"unix:{self._folder}/{name}.sock",
            **settings,
        }
        with (self._folder / f"{name}.log").open("wb") as log:
            popen = subprocess.Popen(
                [sys.executable, "-m", f"blockserve.{service}"],
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        return _Process(name, popen)

    async def _ready(self, process: _Process) -> None:
        assert process.popen.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            line = (await asyncio.to_thread(process.popen.stdout.readline)).decode()
        if not line.startswith("ready "):
            sys.stderr.write((self._folder / f"{process.name}.log").read_text(errors="replace")[-2000:])
            raise BlockzooError(f"{process.name} did not start", hint="Its last lines are above.")
        process.address = line.split()[1]

    async def kill_busiest(self) -> tuple[str, int]:
        """kill -9 of the worker with the most running requests; its name and how many those were."""
        counts = {
            name: (await self._describe(process)).running_requests for name, process in self._live().items()
        }
        name = max(counts, key=lambda one: counts[one])
        self._workers[name].popen.send_signal(signal.SIGKILL)
        return name, counts[name]

    async def shared_segments(self) -> list[str]:
        """A line for the most shared segment of each worker that lives: who met there."""
        lines = []
        for name, process in self._live().items():
            said = await self._describe(process)
            most = max(said.segments, key=lambda one: one.num_chains, default=None)
            if most is not None and most.tokens:
                mixed = 100 * most.mixed_calls / max(1, most.forward_calls)
                lines.append(
                    f"{name}: {most.num_blocks} blocks shared by {most.num_chains} variants, {most.tokens} "
                    f"tokens, several variants in {mixed:.0f} % of the batches (at most "
                    f"{most.largest_batch_chains})"
                )
        return lines

    async def block_bytes(self) -> int:
        """Bytes of blocks in all workers that live."""
        return sum([(await self._describe(process)).block_bytes for process in self._live().values()])

    async def separate_bytes(self, zoo: Zoo, names: list[str]) -> int:
        """What the same variants would take in a server each: all blocks of each chain."""
        total: dict[str, int] = {}
        for process in self._live().values():
            for span in (await self._describe(process)).spans:
                total[span.chain_digest] = max(total.get(span.chain_digest, 0), span.total_bytes)
        return sum(total.get(zoo.resolve(name).chain, 0) for name in names)

    def _live(self) -> dict[str, _Process]:
        return {name: one for name, one in self._workers.items() if one.popen.poll() is None}

    async def _describe(self, process: _Process) -> worker_pb2.DescribeResponse:
        async with grpc.aio.insecure_channel(process.address) as channel:
            return await worker_pb2_grpc.WorkerServiceStub(channel).Describe(
                worker_pb2.DescribeRequest(), timeout=10
            )
