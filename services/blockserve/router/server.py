"""One router process: the callers' gRPC server over the workers of a cluster."""

from __future__ import annotations

import asyncio
import logging
import secrets
from importlib.metadata import version

from blockproto.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc, placement_pb2_grpc
from blockserve.common.placement.servicer import SERVICE as PLACEMENT_SERVICE
from blockserve.common.placement.servicer import PlacementServicer
from blockserve.common.placement.wishes import EvictionFeed, WishKeeper
from blockserve.common.process.tasks import end
from blockserve.common.process.threads import take_turns
from blockserve.common.rpc.host import RpcHost
from blockserve.common.state.opening import open_store, refuse_unfit
from blockserve.common.state.store import StateStore
from blockserve.router.cluster.demand import DemandTeller
from blockserve.router.cluster.engine import ClusterEngine
from blockserve.router.cluster.watching import ClusterWatch
from blockserve.router.fronts.relay import SERVICE as ZOO_SERVICE
from blockserve.router.fronts.relay import ZooRelay
from blockserve.router.fronts.servicer import AdminServicer, InferenceServicer
from blockserve.router.intake.catalog import VariantCatalog
from blockserve.router.intake.chat import ChatRenderer
from blockserve.router.intake.loading import ChainLoader
from blockserve.router.intake.unregistered import UnregisteredAdapters, unregistered_adapters
from blockserve.router.metrics import RouterMetrics
from blockserve.router.operations import Operations
from blockserve.router.paths.adaptive import AdaptiveAssembly
from blockserve.router.paths.chooser import ZooPathChooser
from blockserve.router.service import Router, chat_limits
from blockserve.router.settings import RouterSettings
from blockserve.router.traces.book import TraceBook
from blockzoo.equivalence import Approvals
from blockzoo.store.wishes import WishBook
from blockzoo.zoo import Zoo

log = logging.getLogger(__name__)

SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
    PLACEMENT_SERVICE,
)


class RouterServer:
    """One router. `start` it in the event loop that will run it, and `stop` it there.

    Attributes:
        engine: the cluster behind it; known after `start`.
        metrics: what is counted, and where it is shown.
    """

    def __init__(self, settings: RouterSettings, *, store: StateStore | None = None) -> None:
        """Make a router; nothing is opened yet.

        Args:
            settings: of the process.
            store: instead of the one that the settings name.
        """
        self.settings = settings
        self.metrics = RouterMetrics(settings)
        self._store = store
        self._host = RpcHost(settings, (*SERVICES, ZOO_SERVICE) if settings.passes_zoo_calls else SERVICES)
        self._router: Router | None = None
        self._renderer: ChatRenderer | None = None
        self._watch: ClusterWatch | None = None
        self._demand: DemandTeller | None = None
        self._relay: ZooRelay | None = None
        self._fresh: asyncio.Task[None] | None = None
        self._unregistered: UnregisteredAdapters | None = None
        self.engine: ClusterEngine

    @property
    def address(self) -> str:
        """Where clients reach it; the real port is known after `start`."""
        return self._host.address

    async def start(self) -> None:
        """Open the zoo, follow the cluster, take calls.

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
        if settings.own_cores:
            take_turns()  # before there are threads, which do as the one that starts them
        self._host.bind()
        self.metrics.listen()
        zoo = await asyncio.to_thread(Zoo.open, settings.zoo)
        renderer = self._renderer = ChatRenderer(chat_limits(settings.router))
        store = self._store = self._store or open_store(settings.state)
        await refuse_unfit(store)
        feed = EvictionFeed(WishBook(zoo.store))
        demand = self._demand = DemandTeller(store, f"router-{secrets.token_hex(4)}", evicted=feed)
        approvals = await asyncio.to_thread(Approvals, zoo.store)
        self._unregistered = await asyncio.to_thread(unregistered_adapters, zoo, settings)
        self._wire(zoo, renderer, demand, approvals)
        if settings.passes_zoo_calls:
            self._relay = ZooRelay(store.leader, settings.peer_credentials())
            self._relay.add_to(self._host.server)
        await self._host.start()
        self._watch = watch = ClusterWatch(store, self.engine.update)
        self.metrics.watch(self.engine, lambda: watch.seen)
        watch.start()
        demand.start()
        await self._host.say_serving()
        log.info("ready address=%s zoo=%s version=%s", self.address, zoo.url, version("blockzoo"))

    def _wire(self, zoo: Zoo, renderer: ChatRenderer, demand: DemandTeller, approvals: Approvals) -> None:
        """Make the parts that answer calls, and add their services to the host."""
        settings = self.settings
        chooser = ZooPathChooser(zoo)
        # The demand is for the variant's own chain. A spliced one is made of what is there for others.
        adaptive = AdaptiveAssembly(approvals, chooser, settings.adaptive, on_substituted=demand.note)
        self._fresh = asyncio.create_task(adaptive.keep_fresh(), name="approvals")
        self.engine = engine = ClusterEngine(
            chooser,
            demand,
            settings.peer_credentials(),
            settings.failover,
            settings.kv,
            # Each answer to a call is a request of the engine.
            traced_requests=settings.router.traced_requests * settings.router.max_choices,
            on_request=lambda chain: None if approvals.is_spliced(chain) else demand.note(chain),
        )
        keeper = WishKeeper(zoo, lambda: engine.view)
        catalog = VariantCatalog(zoo, settings.router, unregistered=self._unregistered)
        loader, traces = ChainLoader(engine), TraceBook(settings.router.traced_requests)
        self._router = Router(
            catalog,
            engine,
            loader,
            settings.router,
            traces=traces,
            renderer=renderer,
            metrics=self.metrics.requests,
            adaptive=adaptive,
        )
        operations = Operations(
            catalog, engine, loader, traces, version=version("blockzoo"), operator=engine, wishes=keeper
        )
        server = self._host.server
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(self._router), server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(operations), server)
        placement_pb2_grpc.add_PlacementServiceServicer_to_server(PlacementServicer(keeper), server)

    async def stop(self, *, drain_seconds: float | None = None) -> None:
        """Stop: no new requests, then running answers to their end or the bound.

        Args:
            drain_seconds: instead of the settings' value.
        """
        seconds = self.settings.drain_seconds if drain_seconds is None else drain_seconds
        await self._host.say_stopping()
        if self._router is not None:
            cut_off = await self._router.admission.drain(seconds)
            if cut_off:
                log.warning("answers cut off count=%d", cut_off)
        await self._host.close()
        if self._relay is not None:
            await self._relay.close()
        if self._unregistered is not None:
            await self._unregistered.close()
        await end(self._fresh)
        for part in (self._watch, self._demand):
            if part is not None:
                await part.stop()
        if self._router is not None:
            await self._router.close()
            await self.engine.close()
        elif self._renderer is not None:
            await self._renderer.close()
        if self._store is not None:
            await self._store.close()
        await asyncio.to_thread(self.metrics.close)
        self._router = self._renderer = self._watch = self._demand = self._store = None
        if self._host.has_started:
            log.info("stopped")

    def remove_own_socket(self) -> None:
        """Take away the socket file, if it is this server's."""
        self._host.remove_own_socket()
