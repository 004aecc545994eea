"""One worker process: engine, streams to other workers, a gRPC server, and its lease in the shared state."""

from __future__ import annotations

import asyncio
import logging
import platform
import secrets
from importlib.metadata import version
from typing import Any

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.common.api.cluster import ResidentSegment, WorkerId, WorkerRecord, segment_digest
from blockserve.common.errors import EngineFailedError
from blockserve.common.rpc.address import is_wildcard
from blockserve.common.rpc.host import RpcHost
from blockserve.common.state.opening import open_store, refuse_unfit
from blockserve.common.state.store import StateStore
from blockserve.worker.announcer import Announcer
from blockserve.worker.engine.engine import BlockEngine
from blockserve.worker.metrics import WorkerMetrics
from blockserve.worker.peers.streams import PeerStreams
from blockserve.worker.reconciler import Reconciler
from blockserve.worker.service import WorkerService
from blockserve.worker.servicer import WorkerServicer
from blockserve.worker.settings import WorkerSettings
from blockzoo.errors import BlockzooError
from blockzoo.manifest import ChainId, ChainManifest
from blockzoo.zoo import Zoo

log = logging.getLogger(__name__)

SERVICES = (worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name,)
CLOSE_SECONDS = 1.0
"""How long connections may take to close once no request is left."""
HEALTH_SECONDS = 1.0
STALL_SECONDS = 60.0
"""Work that waits so long without a pass being finished hangs; far longer than a full pass on a slow CPU."""


SICK_SECONDS = 60.0
"""In which requests are counted for `max_failed_passes`."""


class WorkerServer:
    """One worker. `start` it in the event loop that will run it, and `stop` it there.

    Attributes:
        address: where others reach it; known after `start`.
        service: the worker behind the server; known after `start`.
        metrics: what is counted, and where it is shown.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        """Make a worker; nothing is opened yet."""
        self.settings = settings
        self.address = settings.listen
        self.metrics = WorkerMetrics(settings)
        self._store: StateStore | None = None
        self._host = RpcHost(settings, SERVICES, close_seconds=CLOSE_SECONDS)
        self._engine: BlockEngine | None = None
        self._failure: BlockzooError | None = None
        self._announcer: Announcer | None = None
        self._reconciler: Reconciler | None = None
        self._second_store: StateStore | None = None
        self._chains: dict[ChainId, ChainManifest] = {}
        self.service: WorkerService

    async def start(self) -> None:
        """Open the zoo, start the engine, take calls, and make the worker known.

        Raises:
            ConfigurationError: the address cannot be used, or a file of the settings cannot be read.
            ZooNotFoundError: there is no zoo.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop(drain_seconds=0)
            raise

    async def _start(self) -> None:
        settings = self.settings
        self._host.bind()
        self.address = settings.advertise or self._host.address
        if is_wildcard(self.address):
            log.warning("other processes cannot reach %s: set `advertise`", self.address)
        self.metrics.listen()
        zoo = await asyncio.to_thread(Zoo.open, settings.zoo)
        record = self._record()
        credentials = settings.peer_credentials()
        streams = PeerStreams(record.id, credentials, settings.window_bytes)
        self._engine = await asyncio.to_thread(BlockEngine, zoo, settings.engine, outlet=streams)
        self._engine.start(in_loop=True)
        self.service = WorkerService(record, zoo, self._engine, streams, credentials)
        streams.attach(self.service)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(self.service), self._host.server)
        await self._host.start()
        self._store = open_store(settings.state)
        await refuse_unfit(self._store)
        self._announcer = Announcer(
            self.service,
            self._store,
            lambda: self._segments(zoo),
            credentials,
            lease_seconds=settings.state.lease_seconds,
            renew_seconds=settings.state.renew_seconds,
        )
        self.metrics.watch(self._engine.report, streams, self._announcer)
        await self._announcer.start()
        self._second_store = open_store(settings.state)
        self._reconciler = Reconciler(
            self.service, self._second_store, lambda chain: self._manifest(zoo, chain)
        )
        self._reconciler.start()
        self._host.health.watch(self._engine.report, stall_seconds=STALL_SECONDS, every=HEALTH_SECONDS)
        log.info(
            "ready worker=%s address=%s zoo=%s version=%s",
            record.id,
            self.address,
            zoo.url,
            version("blockzoo"),
        )

    async def failed(self) -> BlockzooError:
        """Wait until the engine ends by a fault, its passes go on failing, or the name is another's."""
        assert self._engine is not None
        assert self._announcer is not None
        replaced = self._announcer.replaced
        ended = asyncio.ensure_future(self._engine.failed())
        most = self.settings.max_failed_passes
        try:
            while not ended.done():
                waiting: set[asyncio.Future[Any]] = {ended, replaced}
                await asyncio.wait(waiting, timeout=HEALTH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if replaced.done() and not ended.done():  # what runs goes on elsewhere: `stop` drains
                    return replaced.result()
                count = self._engine.failed_requests(SICK_SECONDS)
                if most and count > most and not ended.done():
                    self._failure = EngineFailedError(
                        f"passes of {count} requests failed within {SICK_SECONDS:g} s, and none succeeded",
                        hint="The log says why; memory that is short is the usual reason.",
                    )
                    return self._failure
        finally:
            ended.cancel()
        self._failure = ended.result()
        return self._failure

    async def stop(self, *, drain_seconds: float | None = None) -> None:
        """Stop: no new requests, the running ones to their end or given back, then the lease.

        Args:
            drain_seconds: instead of the settings' value.
        """
        seconds = self.settings.drain_seconds if drain_seconds is None else drain_seconds
        if self._failure is not None:
            seconds = 0.0  # nothing that runs will end by itself
        await self._host.say_stopping()
        if self._reconciler is not None:
            await self._reconciler.stop()
        if self._announcer is not None:
            given_back = await self.service.drain(seconds)
            log.info("drained worker=%s given_back=%d", self.service.record().id, given_back)
            await self._announcer.stop()
            await self.service.close()
        await self._host.close()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)
        for store in (self._store, self._second_store):
            if store is not None:
                await store.close()
        await asyncio.to_thread(self.metrics.close)
        self._engine = self._announcer = self._store = None
        self._reconciler = self._second_store = None
        if self._host.has_started:
            log.info("stopped")

    def remove_own_socket(self) -> None:
        """Take away the socket file, if it is this server's."""
        self._host.remove_own_socket()

    def _record(self) -> WorkerRecord:
        engine, host = self.settings.engine, platform.node()
        name = self.settings.name or f"{host}-{self.address.rpartition(':')[2].rpartition('/')[2]}"
        return WorkerRecord(
            id=WorkerId(f"{name}.{secrets.token_hex(4)}"),
            name=name,
            address=self.address,
            kv_fingerprint=f"v1,page={engine.kv_page_tokens},sharing={engine.prefix_sharing}",
            block_bytes=engine.block_bytes,
            host=host,
        )

    def _manifest(self, zoo: Zoo, chain: ChainId) -> ChainManifest:
        """A chain, read once."""
        if chain not in self._chains:
            self._chains[chain] = zoo.chain(chain)
        return self._chains[chain]

    def _segments(self, zoo: Zoo) -> frozenset[ResidentSegment]:
        """What the engine holds, named by content."""
        assert self._engine is not None
        held: set[ResidentSegment] = set()
        for chain in self._engine.report().chains:
            manifest = self._manifest(zoo, chain.chain)
            if chain.run is not None:
                digest = segment_digest(manifest.links, chain.run.first, chain.run.end)
                held.add(ResidentSegment(digest, chain.run))
        return frozenset(held)
