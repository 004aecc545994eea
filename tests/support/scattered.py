"""A cluster whose processes are on machines of their own, and harms that lose packets between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from blockserve.client.aio import AsyncClient
from blockserve.common.process.redis_child import find_server_program
from blockzoo.zoo import Zoo
from support.chaos import (
    HALVES,
    HEADS,
    SETTINGS,
    TAILS,
    ChaosCluster,
    Harm,
    HarmFunction,
    until_announced,
    worker_of,
)
from support.cluster import PATIENCE, Process
from support.namespaces import Switch, WayIn
from support.state_servers import ServerBackend

STATE, ROUTER = "state", "router0"
STATE_PORT = 6379


@dataclass
class ScatteredCluster(ChaosCluster):
    """Each worker, the router and the state server on a machine of its own.

    Attributes:
        switch: has the machines, named as the processes.
    """

    switch: Switch = field(kw_only=True)
    _ways: dict[str, WayIn] = field(default_factory=dict)

    @property
    def kinds(self) -> Mapping[str, HarmFunction]:
        """Only what loses packets."""
        return PACKETS

    async def start(self) -> None:
        """Start every process and have every variant held."""
        await asyncio.gather(*(self.start_worker(name) for name in HALVES), self.start_router())
        for process in (*self.workers.values(), *self.routers):
            self._ways[process.address] = await self.switch.way_in(process.address).start()
        await asyncio.gather(*(self.hold(name) for name in HALVES))

    def _process(self, service: str, name: str, settings: dict[str, str]) -> Process:
        machine, state = self.switch.machines[name], self.switch.machines[STATE]
        password = quote(self.state.server.password, safe="")
        where = {
            "BLOCKZOO_STATE_URL": f"redis://:{password}@{state.address}:{STATE_PORT}/0",
            "BLOCKZOO_INSECURE": "true",
            "BLOCKZOO_LISTEN": f"{machine.address}:0",
        }
        process = super(ChaosCluster, self)._process(service, name, {**settings, **where})
        process.prefix = machine.prefix
        return process

    def reach(self, process: Process) -> str:
        """The address at which this process reaches another."""
        return f"127.0.0.1:{self._ways[process.address].port}"

    async def close(self) -> None:
        """End every process and way in."""
        await super().close()
        for way in self._ways.values():
            await way.close()


@asynccontextmanager
async def scattered_cluster(
    zoo: Zoo, folder: Path, models: tuple[str, ...], **settings: str
) -> AsyncIterator[ScatteredCluster]:
    """A running cluster that holds the variants, where namespaces can be made (`require_namespaces`)."""
    with _switch() as switch:
        state = _state_server(switch, folder)
        try:
            rig = ScatteredCluster(
                zoo, folder, state, settings={**SETTINGS, **settings}, models=models, switch=switch
            )
            try:
                await rig.start()
                yield rig
            finally:
                await rig.close()
        finally:
            state.stop()


@contextmanager
def _switch() -> Iterator[Switch]:
    switch = Switch((*HALVES, ROUTER, STATE))
    try:
        yield switch
    finally:
        switch.close()


def _state_server(switch: Switch, folder: Path) -> ServerBackend:
    """The state server on its machine; this process reaches it by a Unix socket, which no cable carries."""
    found = find_server_program()
    assert found is not None, "the extra `cluster` brings a server"
    machine = switch.machines[STATE]
    program = folder / "state-server"
    program.write_text(f'#!/bin/sh\nexec {" ".join(machine.prefix)} "{found}" "$@"\n')
    program.chmod(0o700)
    place = [f"bind {machine.address}", f"port {STATE_PORT}"]
    return ServerBackend(program, socket_path=folder / "state.socket", settings=place)


def switch_of(rig: ChaosCluster) -> Switch:
    """What joins the machines of a scattered cluster."""
    assert isinstance(rig, ScatteredCluster)
    return rig.switch


async def _unplug(rig: ChaosCluster, harm: Harm) -> None:
    """A worker's cable is pulled while it computes; it goes on by itself and believes that it lives."""
    name, moved = await rig.busy(harm.names), _moved(rig)
    with switch_of(rig).unplugged(name):
        while await worker_of(rig, name) is not None or _moved(rig) == moved:
            await asyncio.sleep(0.02)
        await asyncio.sleep(harm.seconds / 4)
    await until_announced(rig)
    await _until_asked(rig, name)


async def _until_asked(rig: ChaosCluster, name: str) -> None:
    """Ask until a worker takes requests again."""

    async def ask(client: AsyncClient) -> None:
        while True:
            await client.generate(rig.models[0], "who is there", max_tokens=16, timeout=PATIENCE).result()

    async with rig.client() as client, asyncio.TaskGroup() as group:
        asking = [group.create_task(ask(client)) for _ in range(8)]
        await rig.busy((name,))
        for task in asking:
            task.cancel()


async def _part_router_and_state(rig: ChaosCluster, harm: Harm) -> None:
    """The router loses sight of the state server and serves on from its last view."""
    told = _count(rig, ROUTER, "going on from the last view")
    with switch_of(rig).apart(ROUTER, STATE):
        while _count(rig, ROUTER, "going on from the last view") == told:
            await asyncio.sleep(0.02)
        await asyncio.sleep(harm.seconds)
    answered = _count(rig, ROUTER, "the shared state answers again")
    while _count(rig, ROUTER, "the shared state answers again") == answered:
        await asyncio.sleep(0.02)


async def _part_tail(rig: ChaosCluster, harm: Harm) -> None:
    """A head worker and a tail worker lose each other; router and state server see both."""
    name, other = await _linked(rig, harm.names)
    before = _losses(rig, name, other)
    with switch_of(rig).apart(name, other):
        while _losses(rig, name, other) == before:
            await asyncio.sleep(0.02)
        await asyncio.sleep(harm.seconds)


async def _part_head(rig: ChaosCluster, harm: Harm) -> None:
    """A head worker loses every tail worker, each of which is well: all its requests go on without it."""
    name, tail = await _linked(rig, TAILS)
    before, moved = _losses(rig, name, tail), _moved(rig)
    with ExitStack() as cuts:
        for other in TAILS:
            cuts.enter_context(switch_of(rig).apart(name, other))
        while _losses(rig, name, tail) == before or _moved(rig) == moved:
            await asyncio.sleep(0.02)
        while (await rig.describe(name)).running_requests:
            await asyncio.sleep(0.02)


async def _linked(rig: ChaosCluster, tails: Sequence[str]) -> tuple[str, str]:
    """A head worker that runs requests, and a tail worker that it sends hidden states to."""
    while True:
        name = await rig.busy(HEADS)
        view = await worker_of(rig, name)
        hops = view.load.hop_seconds if view is not None else {}
        for tail in tails:
            other = await worker_of(rig, tail)
            if other is not None and other.record.id in hops:
                return name, tail


def _losses(rig: ChaosCluster, one: str, other: str) -> int:
    """How often two workers have said of each other that they cannot be reached."""
    return _count(rig, one, f"worker lost worker={other}.") + _count(rig, other, f"worker lost worker={one}.")


PACKETS: Mapping[str, HarmFunction] = {
    "unplug head": _unplug,
    "unplug tail": _unplug,
    "part router and state": _part_router_and_state,
    "part tail": _part_tail,
    "part head": _part_head,
}
"""Harms by name."""


def _moved(rig: ChaosCluster) -> int:
    return _count(rig, ROUTER, "goes on elsewhere")


def _count(rig: ChaosCluster, name: str, text: str) -> int:
    return rig.log(name).count(text)
