"""Several workers in one event loop, joined by real gRPC over sockets in a folder."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from blockproto.v1 import worker_pb2_grpc
from blockserve.common.api.cluster import ChainSpan, PathStep, Run, WorkerId, WorkerRecord
from blockserve.common.api.engine import EngineRequest, TokenEvent
from blockserve.common.rpc.channel import Credentials
from blockserve.common.rpc.interceptors import ErrorInterceptor
from blockserve.worker.engine.engine import BlockEngine
from blockserve.worker.peers.streams import PeerStreams
from blockserve.worker.service import WorkerService
from blockserve.worker.servicer import WorkerServicer
from blockzoo.manifest import ChainId
from support.tiny import SMALL, TinyZoo


@dataclass
class Workers:
    """Workers by name."""

    tiny: TinyZoo
    folder: Path
    services: dict[str, WorkerService] = field(default_factory=dict)

    def step(self, name: str, first: int, end: int) -> PathStep:
        """A worker's part of a path."""
        return PathStep(WorkerId(name), f"unix:{self.folder}/{name}", Run(first, end))

    def engine(self, name: str) -> BlockEngine:
        """A worker's engine."""
        return self.services[name].engine

    async def load(self, chain: ChainId, path: Sequence[PathStep]) -> None:
        """Have each worker of a path hold its run."""
        for step in path:
            await self.engine(step.worker).load_span(ChainSpan(chain, step.run))

    async def run(self, request: EngineRequest) -> list[TokenEvent]:
        """All tokens of a request along its path."""
        engine = self.engine(request.path[0].worker)
        return [event async for batch in engine.generate(request) for event in batch]


@asynccontextmanager
async def running_workers(
    tiny: TinyZoo,
    folder: Path,
    names: Sequence[str],
    servicers: Mapping[str, type[WorkerServicer]] | None = None,
) -> AsyncIterator[Workers]:
    """Workers that take calls; `servicers` for those that speak in a way of their own."""
    made = Workers(tiny, folder)
    servers: list[grpc.aio.Server] = []
    try:
        for name in names:
            streams = PeerStreams(WorkerId(name), Credentials(), 1 << 20)
            engine = BlockEngine(tiny.zoo, SMALL, outlet=streams)
            engine.start()
            record = WorkerRecord(WorkerId(name), name, f"unix:{folder}/{name}", kv_fingerprint="v1")
            service = made.services[name] = WorkerService(record, tiny.zoo, engine, streams, Credentials())
            streams.attach(service)
            server = grpc.aio.server(interceptors=[ErrorInterceptor()])
            servicer = (servicers or {}).get(name, WorkerServicer)(service)
            worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)
            server.add_insecure_port(record.address)
            await server.start()
            servers.append(server)
        yield made
    finally:
        for service in made.services.values():
            await service.close()
        for server in servers:
            await server.stop(None)
        for service in made.services.values():
            service.engine.stop()
