"""Harms to a cluster of real processes, and a script of them that is a function of a seed.

Each harm waits for its effect and asserts it: a run in which nothing was hurt proves nothing.
"""

from __future__ import annotations

import asyncio
import random
import re
import signal
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import grpc
import pytest

from blockserve.common.api.cluster import WorkerView
from blockserve.common.errors import StateStoreError
from blockserve.common.process.redis_child import find_server_program
from blockzoo.zoo import Zoo
from support.cgroups import has_memory_limits, memory_limit, put
from support.chaos_requests import Crowd
from support.cluster import PATIENCE, Cluster, Process
from support.cuttable import Cut, CuttableWire
from support.faults import Broken, Faults, library
from support.state_servers import ServerBackend

LITTLE_BYTES = 64 << 10
"""Less than any pass or message takes."""
JUMPS = (-3600.0, -300.0, 300.0, 3600.0)
"""How wrong clocks are, in seconds."""
LEASE_SECONDS = 1.5
"""Shorter than the default, because harms last a lease."""
HEADS, TAILS = ("a", "c"), ("b", "d")
HALVES = {"a": (0, 3), "b": (3, 0), "c": (0, 3), "d": (3, 0)}
"""Two replicas of each half, where the test places them."""
SETTINGS = {
    "BLOCKZOO_ENGINE_NUM_THREADS": "1",
    "BLOCKZOO_ENGINE_KV_PAGE_TOKENS": "8",
    "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(16 << 20),
    "BLOCKZOO_ENGINE_MAX_TOKENS_PER_PASS": "70",
    "BLOCKZOO_DRAIN_SECONDS": "0.2",
    "BLOCKZOO_STATE_LEASE_SECONDS": str(LEASE_SECONDS),
    "BLOCKZOO_STATE_RENEW_SECONDS": "0.4",
    "BLOCKZOO_STATE_TIMEOUT_SECONDS": "0.5",
}


@dataclass
class ChaosCluster(Cluster):
    """A cluster whose processes each reach the state server over a wire of their own.

    Attributes:
        models: every variant that is asked for.
        is_placed: whether controllers say what workers hold; else the workers of HALVES hold halves.
    """

    models: tuple[str, ...] = ()
    is_placed: bool = False
    wires: dict[str, CuttableWire] = field(default_factory=dict)
    faults: dict[str, Faults] = field(default_factory=dict)

    @property
    def kinds(self) -> Mapping[str, HarmFunction]:
        """What can happen here, by name."""
        return KINDS

    async def start(self) -> None:
        """Start every process and have every variant held."""
        controllers = ("controller0", "controller1") if self.is_placed else ()
        for name in (*HALVES, "router0", *controllers):
            self.wires[name] = await CuttableWire(lambda: self.state.server.port).start()
        await asyncio.gather(
            *(self.start_worker(name) for name in HALVES),
            self.start_router(),
            *(self.start_controller(BLOCKZOO_LOOK_SECONDS="0.3") for _ in controllers),
        )
        await asyncio.gather(*(self.hold(name) for name in HALVES))

    def _process(self, service: str, name: str, settings: dict[str, str]) -> Process:
        url = urlsplit(self.state.server.url)
        wired = url._replace(netloc=f":{url.password}@127.0.0.1:{self.wires[name].port}")
        settings = {"BLOCKZOO_STATE_URL": urlunsplit(wired), **settings}
        if library() is not None:
            faults = self.faults[name] = Faults(self.folder / f"{name}.faults", self.folder / "zoo")
            settings |= faults.environment
        return super()._process(service, name, settings)

    async def hold(self, name: str) -> None:
        """Have a worker read its half of every variant."""
        if not self.is_placed:
            for model in self.models:
                await self.load(name, model, *HALVES[name])

    async def start_again(self, process: Process) -> None:
        """A process that ended, as it was before: a router on its port."""
        assert process.popen is not None
        assert process.popen.poll() is not None
        if process.module.endswith((".router", ".controller")):
            process.environment["BLOCKZOO_LISTEN"] = process.address
        await process.start()

    async def busy(self, names: tuple[str, ...]) -> str:
        """One of the workers that runs requests now; the first of them that does."""
        async with asyncio.timeout(PATIENCE):
            while True:
                for name in names:
                    if (await self.describe(name)).running_requests:
                        return name

    async def close(self) -> None:
        """End every process and wire."""
        await super().close()
        for wire in self.wires.values():
            await wire.close()


@asynccontextmanager
async def chaos_cluster(
    zoo: Zoo, folder: Path, models: tuple[str, ...], *, is_placed: bool, **settings: str
) -> AsyncIterator[ChaosCluster]:
    """A running cluster that holds the variants; `settings` are environment variables of all processes."""
    program = find_server_program()
    assert program is not None, "the extra `cluster` brings a server"
    state = ServerBackend(program)
    rig = ChaosCluster(
        zoo, folder, state, settings={**SETTINGS, **settings}, models=models, is_placed=is_placed
    )
    try:
        await rig.start()
        yield rig
    finally:
        await rig.close()
        state.stop()


@dataclass(frozen=True)
class Harm:
    """One entry of the script.

    Attributes:
        kind: one of the cluster's `kinds`.
        names: processes to hurt, the preferred one first.
        seconds: how long it lasts, for those that last.
        cut: how wires are cut.
    """

    kind: str
    names: tuple[str, ...]
    seconds: float
    cut: Cut

    async def happen(self, rig: ChaosCluster, crowd: Crowd) -> None:
        """Do harm while answers are on their way, and return when all that was ended runs again."""
        await crowd.until_running()
        async with asyncio.timeout(PATIENCE):
            await rig.kinds[self.kind](rig, self)


def make_script(seed: int, kinds: Collection[str], rounds: int = 1) -> list[Harm]:
    """Each kind of harm `rounds` times in an order, to processes and for times drawn from the seed."""
    dice = random.Random(f"harms {seed}")
    script = []
    for _ in range(rounds):
        for kind in dice.sample(sorted(kinds), len(kinds)):
            if "head" in kind:
                names = HEADS
            elif "tail" in kind:
                names = TAILS
            else:
                names = tuple(HALVES)
            seconds = dice.uniform(0.1, LEASE_SECONDS + 1.0)
            names = tuple(dice.sample(names, len(names)))
            cut = dice.choice(list(Cut))
            # Requests come in before each step of a rolling restart, so it is one entry for each worker.
            steps = [(name,) for name in names] if kind == "roll" else [names]
            script += [Harm(kind, step, seconds, cut) for step in steps]
    return script


async def _kill_worker(rig: ChaosCluster, harm: Harm) -> None:
    process = rig.workers[await rig.busy(_names(rig, harm))]
    process.kill()
    assert process.popen is not None
    assert process.popen.returncode == -signal.SIGKILL
    await _restart_worker(rig, process)


async def _stop_worker(rig: ChaosCluster, harm: Harm) -> None:
    name = await rig.busy(_names(rig, harm))
    with _stopped(rig.workers[name]):
        while await worker_of(rig, name) is not None:
            await asyncio.sleep(0.02)
        await asyncio.sleep(harm.seconds / 4)
    await until_announced(rig)


async def _drain(rig: ChaosCluster, harm: Harm) -> None:
    process = rig.workers[await rig.busy(_names(rig, harm))]
    assert await process.terminate() == 0
    await _restart_worker(rig, process)


async def _roll(rig: ChaosCluster, harm: Harm) -> None:
    """One step of it; the worker may have nothing to do."""
    process = rig.workers[harm.names[0]]
    assert await process.terminate() == 0
    await _restart_worker(rig, process)


async def _kill_router(rig: ChaosCluster, harm: Harm) -> None:
    (router,) = rig.routers
    router.kill()
    assert router.popen is not None
    assert router.popen.returncode == -signal.SIGKILL
    await asyncio.sleep(harm.seconds / 2)
    await rig.start_again(router)


async def _kill_controller(rig: ChaosCluster, harm: Harm) -> None:
    """The one that leads; the other leads after it."""
    leads = [rig.log(f"controller{i}").count("leading token=") for i in range(2)]
    token = [_last_token(rig.log(f"controller{i}")) for i in range(2)]
    leader = token.index(max(token))
    rig.controllers[leader].kill()
    while rig.log(f"controller{1 - leader}").count("leading token=") == leads[1 - leader]:
        await asyncio.sleep(0.02)
    await rig.start_again(rig.controllers[leader])


async def _kill_state(rig: ChaosCluster, harm: Harm) -> None:
    before = rig.state.server.pid
    await asyncio.to_thread(rig.state.kill)
    await asyncio.sleep(harm.seconds)
    await asyncio.to_thread(rig.state.restart)
    assert rig.state.server.pid != before
    await until_announced(rig)


async def _flush_state(rig: ChaosCluster, harm: Harm) -> None:
    for _ in range(3):
        await asyncio.to_thread(rig.state.flush)
        await asyncio.sleep(harm.seconds / 5)
    await until_announced(rig)


async def _pause_state(rig: ChaosCluster, harm: Harm) -> None:
    with rig.state.paused():
        while _scheduler_state(rig.state.server.pid) != "T":
            await asyncio.sleep(0.001)
        await asyncio.sleep(harm.seconds)
    await until_announced(rig)


async def _cut_state(rig: ChaosCluster, harm: Harm) -> None:
    """The router and some or all workers lose sight of the state server."""
    names = ("router0", *harm.names[: 1 + int(harm.seconds * 10) % len(harm.names)])
    wires = [rig.wires[name] for name in names]
    before = [wire.num_stopped for wire in wires]
    with ExitStack() as cuts:
        for wire in wires:
            cuts.enter_context(wire.cut(harm.cut))
        await asyncio.sleep(harm.seconds)
        while any(wire.num_stopped == count for wire, count in zip(wires, before, strict=True)):
            await asyncio.sleep(0.02)
    await until_announced(rig)


async def _break_bus(rig: ChaosCluster, harm: Harm) -> None:
    """A page of a mapped file cannot be read: the kernel ends the process that touched it by SIGBUS."""
    process = rig.workers[await rig.busy(_names(rig, harm))]
    process.send(signal.SIGBUS)
    await _ended(process, signal.SIGBUS)
    await _restart_worker(rig, process)


async def _exceed_memory(rig: ChaosCluster, harm: Harm) -> None:
    """The memory cgroup of a worker has no room for what it takes next."""
    name = await rig.busy(_names(rig, harm))
    process = rig.workers[name]
    assert process.popen is not None
    with memory_limit(LITTLE_BYTES) as group:
        assert group is not None
        put(process.popen.pid, group)
        # Passes may do for long with the memory that the process has. Blocks that it lacks take more.
        loading = asyncio.create_task(rig.load(name, rig.models[-1]))
        await _ended(process, signal.SIGKILL)
        with suppress(grpc.aio.AioRpcError):
            await loading
    await _restart_worker(rig, process)


async def _break_disk(rig: ChaosCluster, harm: Harm) -> None:
    """A worker's disk fails: it serves what it holds, says why it cannot read more, and does so later."""
    name = await rig.busy(_names(rig, harm))
    held, faults, model = HALVES[name], rig.faults[name], rig.models[-1]
    other = (3, 0) if held[0] == 0 else (0, 3)
    before = faults.num_failed
    with faults.broken(Broken.READS | Broken.WRITES):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.load(name, model, *other)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert faults.num_failed > before
        chain = rig.zoo.resolve(model).chain
        while (view := await worker_of(rig, name)) is None or chain not in view.load.unreadable:
            await asyncio.sleep(0.02)
        await asyncio.sleep(harm.seconds / 4)
    await rig.load(name, model, *other)
    await rig.unload(name, model, *other)


async def _jump_clocks(rig: ChaosCluster, harm: Harm) -> None:
    """Every process gets another wrong time, twice, and then the right one again: nobody counts as lost."""
    dice = random.Random(harm.seconds)
    for _ in range(2):
        for faults in rig.faults.values():
            faults.set_clock(dice.choice(JUMPS))
        until = time.monotonic() + LEASE_SECONDS / 2
        while time.monotonic() < until:
            for name in HALVES:
                assert await worker_of(rig, name) is not None, name
            await asyncio.sleep(0.05)
    for faults in rig.faults.values():
        faults.set_clock(0.0)


HarmFunction = Callable[[ChaosCluster, Harm], Awaitable[None]]
KINDS: Mapping[str, HarmFunction] = {
    "kill head": _kill_worker,
    "kill tail": _kill_worker,
    "stop head": _stop_worker,
    "stop tail": _stop_worker,
    "drain": _drain,
    "roll": _roll,
    "kill router": _kill_router,
    "kill controller": _kill_controller,
    "kill state": _kill_state,
    "flush state": _flush_state,
    "pause state": _pause_state,
    "cut state": _cut_state,
    "bus error head": _break_bus,
    "memory tail": _exceed_memory,
    "disk head": _break_disk,
    "disk tail": _break_disk,
    "clocks": _jump_clocks,
}
"""What happens, by name."""
DISKS = frozenset({"disk head", "disk tail"})
"""Needs to know what workers hold."""


class LeftOutWarning(UserWarning):
    """Harms that a run cannot do on this machine; pytest lists it at the end of the run."""


def possible(kinds: Collection[str]) -> Collection[str]:
    """Those that can be done here; a warning names the others and what this machine lacks for them."""
    needs = {
        "a C compiler": (library() is not None, DISKS | {"clocks"}),
        "a memory cgroup that this user may write": (has_memory_limits(), frozenset({"memory tail"})),
    }
    left_out: set[str] = set()
    for need, (is_there, needed_by) in needs.items():
        if not is_there and (missing := needed_by & set(kinds)):
            text = f"harms left out for want of {need}: {', '.join(sorted(missing))}"
            warnings.warn(text, LeftOutWarning, stacklevel=2)
            left_out |= missing
    return set(kinds) - left_out


WITHOUT_CONTROLLERS = frozenset(KINDS) - {"kill controller"}
FEW = frozenset({"kill head", "stop tail", "drain", "kill controller", "kill state"})
"""One of a sort, for short runs."""


async def _ended(process: Process, number: signal.Signals) -> None:
    """Wait until the kernel has ended a process by this signal."""
    assert process.popen is not None
    assert await asyncio.to_thread(process.popen.wait, PATIENCE) == -number


async def _restart_worker(rig: ChaosCluster, process: Process) -> None:
    """Start a worker again and wait until it is known and holds what it held."""
    await rig.start_again(process)
    await rig.hold(process.environment["BLOCKZOO_NAME"])
    await until_announced(rig)


async def until_announced(rig: ChaosCluster) -> None:
    """Wait until the state has every worker again."""
    for name in HALVES:
        while await worker_of(rig, name) is None:
            await asyncio.sleep(0.02)


async def worker_of(rig: ChaosCluster, name: str) -> WorkerView | None:
    """What the state says of a worker's present life; a state server that was just harmed says nothing."""
    try:
        views = (await rig.view()).workers.values()
    except StateStoreError:
        return None
    address = rig.workers[name].address
    return next((one for one in views if one.record.name == name and one.record.address == address), None)


@contextmanager
def _stopped(process: Process) -> Iterator[None]:
    """SIGSTOP, and SIGCONT at the end."""
    assert process.popen is not None
    process.send(signal.SIGSTOP)
    try:
        while _scheduler_state(process.popen.pid) != "T":
            time.sleep(0.001)
        yield
    finally:
        process.send(signal.SIGCONT)


def _scheduler_state(pid: int) -> str:
    """The letter of the kernel for what a process does: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _last_token(log: str) -> int:
    """The fencing token that a controller led with last; 0 for one that never led."""
    tokens = re.findall(r"leading token=(\d+)", log)
    return int(tokens[-1]) if tokens else 0


def _names(rig: ChaosCluster, harm: Harm) -> tuple[str, ...]:
    """Whom a harm may hit: where controllers place, heads and tails are anybody."""
    return tuple(HALVES) if rig.is_placed else harm.names
