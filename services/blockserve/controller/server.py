"""One controller process: the zoo's gRPC front, and the placement while it leads."""

from __future__ import annotations

import asyncio
import logging
import platform
import secrets
from importlib.metadata import version

import grpc

from blockproto.v1 import placement_pb2_grpc, zoo_pb2, zoo_pb2_grpc
from blockserve.common.placement.servicer import SERVICE as PLACEMENT_SERVICE
from blockserve.common.placement.servicer import PlacementServicer
from blockserve.common.placement.wishes import WishKeeper
from blockserve.common.rpc.health import NOT_SERVING, SERVING, HealthReporter
from blockserve.common.rpc.interceptors import ErrorInterceptor, TokenInterceptor
from blockserve.common.rpc.listen import bind, enable_reflection, remove_socket, server_options
from blockserve.common.rpc.settings import read_token
from blockserve.common.state.opening import open_store, refuse_unfit
from blockserve.common.state.store import StateStore
from blockserve.controller.metrics import ControllerMetrics
from blockserve.controller.planning.planner import Planner
from blockserve.controller.servicer import ZooServicer
from blockserve.controller.settings import ControllerSettings
from blockzoo.zoo import Zoo

log = logging.getLogger(__name__)

SERVICES = (zoo_pb2.DESCRIPTOR.services_by_name["ZooService"].full_name, PLACEMENT_SERVICE)
CLOSE_SECONDS = 2.0
"""How long calls in progress may take to end."""


class ControllerServer:
    """One controller. `start` it in the event loop that will run it, and `stop` it there.

    Attributes:
        address: where others reach it; known after `start`.
        metrics: what is counted, and where it is shown.
    """

    def __init__(self, settings: ControllerSettings) -> None:
        """Make a controller; nothing is opened yet."""
        self.settings = settings
        self.address = settings.listen
        self.metrics = ControllerMetrics(settings)
        self._health = HealthReporter(SERVICES)
        self._is_bound = self._is_started = False
        self._server: grpc.aio.Server | None = None
        self._servicer: ZooServicer | None = None
        self._store: StateStore | None = None
        self._planner: Planner | None = None

    async def start(self) -> None:
        """Open the zoo, take calls, try to lead.

        Raises:
            ConfigurationError: the address cannot be used, or a file of the settings cannot be read.
            ZooNotFoundError: there is no zoo.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        settings = self.settings
        token = read_token(settings)
        interceptors: list[grpc.aio.ServerInterceptor] = [ErrorInterceptor()]
        if token is not None:
            interceptors.insert(0, TokenInterceptor(token))
        self._server = grpc.aio.server(interceptors=interceptors, options=server_options(settings))
        self.address = bind(self._server, settings)
        self._is_bound = True
        self.metrics.listen()
        zoo = await asyncio.to_thread(lambda: Zoo.open(settings.zoo, create=settings.create_zoo))
        limits = settings.controller.within_messages(settings.max_message_bytes)
        self._servicer = ZooServicer(zoo, limits, on_change=lambda name: log.info("changed name=%s", name))
        zoo_pb2_grpc.add_ZooServiceServicer_to_server(self._servicer, self._server)
        self._store = open_store(settings.state)
        await refuse_unfit(self._store)
        self._planner = planner = Planner(
            zoo,
            self._store,
            f"{platform.node()}-{secrets.token_hex(4)}",
            lease_seconds=settings.state.lease_seconds,
            look_seconds=settings.look_seconds,
            replicas=settings.replicas,
        )
        self.metrics.watch(planner)
        keeper = WishKeeper(zoo, lambda: planner.view)
        placement_pb2_grpc.add_PlacementServiceServicer_to_server(PlacementServicer(keeper), self._server)
        self._health.add_to(self._server)
        if settings.serves_reflection:
            enable_reflection(self._server, SERVICES)
        await self._health.set(NOT_SERVING)
        await self._server.start()
        self._is_started = True
        planner.start()
        await self._health.set(SERVING)
        log.info("ready address=%s zoo=%s version=%s", self.address, zoo.url, version("blockzoo"))

    async def stop(self) -> None:
        """Stop: leadership first, then calls in progress."""
        await self._health.stop()
        if self._planner is not None:
            await self._planner.stop()
        if self._server is not None:
            if self._is_bound and not self._is_started:
                # gRPC lets go of a port only when a server that was started is stopped.
                await self._server.start()
            await self._server.stop(CLOSE_SECONDS)
            self.remove_own_socket()
        if self._servicer is not None:
            await self._servicer.close()
        if self._store is not None:
            await self._store.close()
        await asyncio.to_thread(self.metrics.close)
        self._server = self._servicer = self._store = self._planner = None
        log.info("stopped")

    def remove_own_socket(self) -> None:
        """Take away the socket file, if it is this server's."""
        if self._is_bound:
            remove_socket(self.address)
