"""A cluster of real processes for tests: workers, routers and a state server, to be hurt and looked into."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self

import grpc

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.client.aio import AsyncClient
from blockserve.common.api.cluster import ClusterView, WorkerView
from blockserve.common.process.redis_child import find_server_program
from blockzoo.zoo import Zoo
from support.forked import ForkedProcess, ending_with_us, fork_server
from support.state_servers import ServerBackend

PATIENCE = 60.0
"""Seconds to wait for anything; a machine that is busy with other work needs long."""


@dataclass
class Process:
    """One process of ours that printed where it listens.

    It is forked from a process that has its modules already; `support.fork_server` says what that leaves out.
    A process with `by_command`, a prefix, a launcher or variables that libraries may read is not forked.
    """

    module: str
    environment: dict[str, str]
    log: Path
    popen: subprocess.Popen[bytes] | ForkedProcess | None = None
    address: str = ""
    prefix: tuple[str, ...] = ()
    """What stands before the command; it has to become the command, process id and all."""
    launcher: tuple[str, ...] = ("-m",)
    """What stands between `python` and the module."""
    by_command: bool = False
    """Whether it is started as users start it, `python -m MODULE`."""

    async def start(self) -> Self:
        """Start it and wait until it is ready."""
        with self.log.open("ab") as log:
            self.popen = self._forked(log) or self._run_command(log)
        stdout = self.popen.stdout
        assert stdout is not None
        async with asyncio.timeout(PATIENCE):
            line = (await asyncio.to_thread(stdout.readline)).decode()
        assert line.startswith("ready "), f"{self.module} did not start:\n{self.log.read_text()[-2000:]}"
        self.address = line.split()[1]
        return self

    def _forked(self, log: BinaryIO) -> ForkedProcess | None:
        server = None if self.by_command or self.prefix or self.launcher != ("-m",) else fork_server()
        environment = {**os.environ, **self.environment}
        if server is None or not server.can_start(environment):
            return None
        return server.start(self.module, environment, log)

    def _run_command(self, log: BinaryIO) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self.prefix, *ending_with_us(), sys.executable, *self.launcher, self.module],
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=log,
        )

    def send(self, number: signal.Signals) -> None:
        """Signal it."""
        assert self.popen is not None
        self.popen.send_signal(number)

    def kill(self) -> None:
        """kill -9."""
        if self.popen is not None:
            self.popen.kill()
            self.popen.wait()

    async def terminate(self) -> int:
        """SIGTERM, and its exit status."""
        self.send(signal.SIGTERM)
        assert self.popen is not None
        async with asyncio.timeout(PATIENCE):
            return await asyncio.to_thread(self.popen.wait)


@dataclass
class Cluster:
    """Workers by name and routers by number, over one zoo and one state server."""

    zoo: Zoo
    folder: Path
    state: ServerBackend
    workers: dict[str, Process] = field(default_factory=dict)
    routers: list[Process] = field(default_factory=list)
    controllers: list[Process] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    launchers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of processes, by name, that are not run as they are; see `support.neighbour`."""
    by_command: bool = False
    """Whether processes are started as users start them; else forked, see `Process`."""

    def __post_init__(self) -> None:
        self.store = self.state.open()

    async def start_worker(self, name: str, **settings: str) -> Process:
        """Start a worker, or start it again."""
        process = self._process("worker", name, {"BLOCKZOO_NAME": name, **settings})
        self.workers[name] = process
        return await process.start()

    async def start_router(self, listen: str = "127.0.0.1:0", **settings: str) -> Process:
        """Start a router."""
        process = self._process(
            "router", f"router{len(self.routers)}", {"BLOCKZOO_LISTEN": listen, **settings}
        )
        self.routers.append(process)
        return await process.start()

    async def start_controller(self, **settings: str) -> Process:
        """Start a controller."""
        name = f"controller{len(self.controllers)}"
        process = self._process("controller", name, {"BLOCKZOO_LISTEN": "127.0.0.1:0", **settings})
        self.controllers.append(process)
        return await process.start()

    def _process(self, service: str, name: str, settings: dict[str, str]) -> Process:
        common = {
            "BLOCKZOO_ZOO": str(self.folder / "zoo"),
            "BLOCKZOO_STATE_URL": self.state.server.url,
            "BLOCKZOO_LOG_LEVEL": "info",
            "OMP_NUM_THREADS": "1",
        }
        log = self.folder / f"{name}.log"
        environment = {**common, **self.settings, **settings}
        launcher = self.launchers.get(name, ("-m",))
        module = f"blockserve.{service}"
        return Process(module, environment, log, launcher=launcher, by_command=self.by_command)

    def log(self, name: str) -> str:
        """What a process has logged."""
        return (self.folder / f"{name}.log").read_text()

    def client(self, router: int = 0) -> AsyncClient:
        """A client of a router."""
        return AsyncClient(self.reach(self.routers[router]), resume_attempts=20)

    def reach(self, process: Process) -> str:
        """The address at which this process reaches another."""
        return process.address

    async def load(self, name: str, model: str, first: int = 0, end: int = 0) -> None:
        """Have a worker read a run of a variant's chain; `end` 0 is the chain's end."""
        chain = self.zoo.resolve(model).chain
        request = worker_pb2.LoadSpanRequest(chain_digest=chain, first=first, end=end)
        async with grpc.aio.insecure_channel(self.reach(self.workers[name])) as channel:
            await worker_pb2_grpc.WorkerServiceStub(channel).LoadSpan(request, timeout=PATIENCE)

    async def unload(self, name: str, model: str, first: int = 0, end: int = 0) -> None:
        """Have a worker let go of a run that it was given by `load`."""
        chain = self.zoo.resolve(model).chain
        request = worker_pb2.UnloadSpanRequest(chain_digest=chain, first=first, end=end)
        async with grpc.aio.insecure_channel(self.reach(self.workers[name])) as channel:
            await worker_pb2_grpc.WorkerServiceStub(channel).UnloadSpan(request, timeout=PATIENCE)

    async def describe(self, name: str) -> worker_pb2.DescribeResponse:
        """What a worker says of itself."""
        async with grpc.aio.insecure_channel(self.reach(self.workers[name])) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            return await stub.Describe(worker_pb2.DescribeRequest(), timeout=PATIENCE)

    async def view(self) -> ClusterView:
        """The shared state."""
        return await self.store.view()

    async def worker_view(self, name: str) -> WorkerView | None:
        """What the shared state has about a worker."""
        views = (await self.view()).workers.values()
        return next((one for one in views if one.record.name == name), None)

    async def is_clean(self) -> bool:
        """Whether no live worker holds a request or its pages."""
        for name, process in self.workers.items():
            if process.popen is None or process.popen.poll() is not None:
                continue
            said = await self.describe(name)
            if said.kv_pages_used or said.running_requests or said.waiting_requests:
                return False
        return True

    async def until_clean(self) -> None:
        """Wait until nothing is held any more."""
        async with asyncio.timeout(PATIENCE):
            while not await self.is_clean():
                await asyncio.sleep(0.05)

    async def close(self) -> None:
        """End every process."""
        await self.store.close()
        for process in (*self.routers, *self.controllers, *self.workers.values()):
            process.kill()


@asynccontextmanager
async def cluster(
    zoo: Zoo, folder: Path, workers: Sequence[str], *, by_command: bool = False, **settings: str
) -> AsyncIterator[Cluster]:
    """A running cluster; `settings` are environment variables of all its processes."""
    program = find_server_program()
    assert program is not None, "the extra `cluster` brings a server"
    state = ServerBackend(program)
    made = Cluster(zoo, folder, state, settings=settings, by_command=by_command)
    try:
        await asyncio.gather(*(made.start_worker(name) for name in workers), made.start_router())
        yield made
    finally:
        await made.close()
        state.stop()
