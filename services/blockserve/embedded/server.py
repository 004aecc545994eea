"""The embedded server: zoo, engine and router in one process, behind one gRPC server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import grpc

import blockserve
from blockproto.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    zoo_pb2,
    zoo_pb2_grpc,
)
from blockserve.common.rpc.host import RpcHost
from blockserve.controller.servicer import ZooServicer
from blockserve.embedded.metrics import ServerMetrics
from blockserve.embedded.settings import EmbeddedSettings
from blockserve.embedded.startup import (
    Parts,
    RunnableEngine,
    Timeline,
    names_to_preload,
    parse_ahead,
    process_age,
)
from blockserve.router.fronts.servicer import AdminServicer, InferenceServicer
from blockserve.router.intake.catalog import VariantCatalog, ZooReader
from blockserve.router.intake.chat import ChatRenderer
from blockserve.router.intake.loading import ChainLoader
from blockserve.router.intake.unregistered import UnregisteredAdapters, unregistered_adapters
from blockserve.router.operations import Operations
from blockserve.router.service import Router, chat_limits
from blockserve.router.traces.book import TraceBook
from blockzoo.errors import BlockzooError
from blockzoo.zoo import Zoo

log = logging.getLogger(__name__)

SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
    zoo_pb2.DESCRIPTOR.services_by_name["ZooService"].full_name,
)


class EmbeddedServer:
    """One server. `start` it in the event loop that will run it, and `stop` it there.

    Attributes:
        timeline: where the time of the start went.
        metrics: what is counted, and where it is shown.
    """

    def __init__(self, settings: EmbeddedSettings, *, parts: Parts | None = None) -> None:
        """Make a server; nothing is opened yet."""
        self.settings = settings
        self.timeline = Timeline(process_age())
        self.metrics = ServerMetrics(settings)
        self._parts = parts or Parts()
        self._host = RpcHost(settings, SERVICES)
        self._engine: RunnableEngine | None = None
        self._router: Router | None = None
        self._zoo_servicer: ZooServicer | None = None
        self._renderer: ChatRenderer | None = None
        self._unregistered: UnregisteredAdapters | None = None
        self._failure: BlockzooError | None = None

    @property
    def address(self) -> str:
        """Where clients reach it; the real port is known after `start`."""
        return self._host.address

    async def start(self) -> None:
        """Open the zoo, start the engine, take calls, read what is to be preloaded, say SERVING.

        Raises:
            ConfigurationError: the address cannot be used, or a file of the settings cannot be read.
            ZooNotFoundError: there is no zoo.
        """
        try:
            await self._start()
        except asyncio.CancelledError:
            # Told to stop while variants were being read: some may be serving already.
            await self.stop()
            raise
        except BaseException:
            await self.stop(drain_seconds=0)
            raise

    async def _start(self) -> None:
        settings = self.settings
        self._host.bind()
        self.metrics.listen()
        self._renderer = ChatRenderer(chat_limits(settings.router))
        with self.timeline.stage("prepare"):
            zoo, catalog, wanted = await self._prepare(self._renderer)
        with self.timeline.stage("engine"):
            self._engine = await asyncio.to_thread(self._parts.make_engine, zoo, settings.engine)
            self._engine.start()
        loader, traces = ChainLoader(self._engine), TraceBook(settings.router.traced_requests)
        self._router = Router(
            catalog,
            self._engine,
            loader,
            settings.router,
            traces=traces,
            renderer=self._renderer,
            metrics=self.metrics.requests,
        )
        operations = Operations(catalog, self._engine, loader, traces, version=blockserve.__version__)
        self.metrics.watch(self._engine, zoo)
        self._add_services(self._host.server, self._router, operations)
        self._add_zoo_service(self._host.server, zoo, catalog)
        await self._host.start()
        log.info("listening address=%s zoo=%s version=%s", self.address, zoo.url, blockserve.__version__)
        with self.timeline.stage("preload"):
            await self._preload(operations, wanted)
        self._host.health.watch(
            self._engine.report, stall_seconds=settings.stall_seconds, every=settings.health_seconds
        )
        log.info("ready address=%s", self.address)
        log.debug("timeline: %s", self.timeline)

    async def _prepare(self, renderer: ChatRenderer) -> tuple[ZooReader, VariantCatalog, list[str]]:
        """Side by side: import the engine, read the zoo, start the template process."""
        imports = asyncio.create_task(asyncio.to_thread(self._import_engine))
        warm = asyncio.create_task(self._warm(renderer))
        try:
            result = await asyncio.to_thread(self._read_zoo)
            await imports
            await warm
        finally:
            imports.cancel()
            warm.cancel()
            await asyncio.gather(imports, warm, return_exceptions=True)
        return result

    async def _warm(self, renderer: ChatRenderer) -> None:
        """Only saves time: without it the first conversation starts the process, or is told why it cannot."""
        try:
            await renderer.warm()
        except (BlockzooError, OSError, TimeoutError, EOFError) as error:
            log.warning("chat templates cannot be rendered yet: %r", error)

    def _import_engine(self) -> None:
        with self.timeline.stage("import_engine"):
            self._parts.import_engine()

    def _read_zoo(self) -> tuple[ZooReader, VariantCatalog, list[str]]:
        with self.timeline.stage("open_zoo"):
            if self.settings.create_zoo:
                Zoo.open(self.settings.zoo, create=True)
            zoo = self._parts.open_zoo(self.settings.zoo)
            wanted = names_to_preload(zoo, (*self.settings.pin, *self.settings.preload))
            if isinstance(zoo, Zoo):
                self._unregistered = unregistered_adapters(zoo, self.settings)
        catalog = VariantCatalog(zoo, self.settings.router, unregistered=self._unregistered)
        with self.timeline.stage("tokenizers"):
            parse_ahead(catalog, wanted)
        return zoo, catalog, wanted

    def _add_services(self, server: grpc.aio.Server, router: Router, operations: Operations) -> None:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(router), server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(operations), server)

    def _add_zoo_service(self, server: grpc.aio.Server, zoo: ZooReader, catalog: VariantCatalog) -> None:
        if isinstance(zoo, Zoo):
            limits = self.settings.controller.within_messages(self.settings.max_message_bytes)
            self._zoo_servicer = ZooServicer(zoo, limits, on_change=catalog.forget)
            zoo_pb2_grpc.add_ZooServiceServicer_to_server(self._zoo_servicer, server)

    async def _preload(self, operations: Operations, refs: Sequence[str]) -> None:
        """Load variants one after another; one that cannot be loaded does not hold up the others."""
        for ref in refs:
            try:
                await operations.load(ref, pinned=True if ref in self.settings.pin else None)
            except BlockzooError as error:
                log.error("variant not loaded variant=%s reason=%s: %s", ref, error.reason, error)

    async def failed(self) -> BlockzooError:
        """Wait until the engine ends by a fault."""
        assert self._engine is not None
        self._failure = await self._engine.failed()
        return self._failure

    async def stop(self, *, drain_seconds: float | None = None) -> None:
        """Stop: NOT_SERVING first, then no new requests, then running answers to their end or the bound.

        Args:
            drain_seconds: instead of the settings' value.
        """
        seconds = self.settings.drain_seconds if drain_seconds is None else drain_seconds
        if self._failure is not None:
            seconds = 0.0  # nothing that runs will end by itself
        await self._host.say_stopping()
        if self._router is not None:
            running = self._router.admission.num_requests
            log.info("stopping requests=%d drain_seconds=%g", running, seconds)
            cut_off = await self._router.admission.drain(seconds)
            if cut_off:
                log.warning("answers cut off count=%d", cut_off)
        await self._host.close()
        if self._zoo_servicer is not None:
            await self._zoo_servicer.close()
            self._zoo_servicer = None
        if self._unregistered is not None:
            await self._unregistered.close()
        if self._router is not None:
            await self._router.close()
        elif self._renderer is not None:
            await self._renderer.close()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)
        await asyncio.to_thread(self.metrics.close)
        self._router = self._engine = self._renderer = None
        if self._host.has_started:
            log.info("stopped")

    def remove_own_socket(self) -> None:
        """Take away the socket file, if it is this server's."""
        self._host.remove_own_socket()

    def cut_off(self) -> None:
        """End a drain in progress: the answers still running break off now."""
        if self._router is not None:
            self._router.admission.evict()
