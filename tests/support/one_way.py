"""A cluster whose workers are each reached over a wire that can lose one direction, and such harms."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from blockserve.common.process.redis_child import find_server_program
from blockzoo.zoo import Zoo
from support.chaos import HALVES, SETTINGS, ChaosCluster, Harm, HarmFunction, worker_of
from support.cluster import Process
from support.cuttable import Cut, CuttableWire
from support.state_servers import ServerBackend, free_port

SEEN_SECONDS = 30.0
"""More than it takes to see that one direction is dead: the keepalive and its timeout, 20 s together."""


@dataclass
class OneWayCluster(ChaosCluster):
    """Routers and workers connect to each worker over a wire of its own; the wires to the state stay whole.

    Attributes:
        ways: the wires, by the worker they lead to.
        ports: where these workers listen.
    """

    ways: dict[str, CuttableWire] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)

    @property
    def kinds(self) -> Mapping[str, HarmFunction]:
        """Only what loses one direction."""
        return ONE_WAY

    async def start(self) -> None:
        """Make the wires, then start as others do."""
        for name in HALVES:
            self.ports[name] = free_port()
            self.ways[name] = await CuttableWire(lambda name=name: self.ports[name]).start()  # type: ignore[misc]
        await super().start()

    def _process(self, service: str, name: str, settings: dict[str, str]) -> Process:
        if name in self.ways:
            settings = {
                "BLOCKZOO_LISTEN": f"127.0.0.1:{self.ports[name]}",
                "BLOCKZOO_ADVERTISE": f"127.0.0.1:{self.ways[name].port}",
                **settings,
            }
        return super()._process(service, name, settings)

    def reach(self, process: Process) -> str:
        """The test itself goes past the wires."""
        name = process.environment.get("BLOCKZOO_NAME", "")
        return f"127.0.0.1:{self.ports[name]}" if name in self.ports else super().reach(process)

    async def close(self) -> None:
        """End every process and wire."""
        await super().close()
        for way in self.ways.values():
            await way.close()


@asynccontextmanager
async def one_way_cluster(
    zoo: Zoo, folder: Path, models: tuple[str, ...], **settings: str
) -> AsyncIterator[OneWayCluster]:
    """A running cluster that holds the variants."""
    program = find_server_program()
    assert program is not None, "the extra `cluster` brings a server"
    state = ServerBackend(program)
    rig = OneWayCluster(zoo, folder, state, settings={**SETTINGS, **settings}, models=models)
    try:
        await rig.start()
        yield rig
    finally:
        await rig.close()
        state.stop()


async def _lose(rig: ChaosCluster, harm: Harm) -> None:
    """One direction to a worker that runs requests dies; its lease goes on, and so does everything else."""
    assert isinstance(rig, OneWayCluster)
    name = await rig.busy(harm.names)
    way, before = rig.ways[name], _losses(rig, name)
    stopped = way.num_stopped
    with way.cut(Cut.TO_SERVER if harm.kind.startswith("deaf") else Cut.FROM_SERVER):
        async with asyncio.timeout(SEEN_SECONDS):
            while way.num_stopped == stopped or _losses(rig, name) == before:
                await asyncio.sleep(0.02)
        assert await worker_of(rig, name) is not None
        await asyncio.sleep(harm.seconds / 4)


def _losses(rig: ChaosCluster, name: str) -> int:
    """How often others have given up a connection to a worker, or requests have left a path."""
    told = sum(rig.log(other).count(f"worker lost worker={name}.") for other in HALVES)
    return told + rig.log("router0").count("goes on elsewhere")


ONE_WAY: Mapping[str, HarmFunction] = {
    "deaf head": _lose,
    "deaf tail": _lose,
    "mute head": _lose,
    "mute tail": _lose,
}
"""Harms by name: what is sent to a worker vanishes, or what it sends over connections that others made."""
