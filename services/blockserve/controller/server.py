"""One controller process: the zoo's gRPC front, and the placement while it leads."""

from __future__ import annotations

import asyncio
import logging
import platform
import secrets
from importlib.metadata import version

from blockproto.v1 import placement_pb2_grpc, zoo_pb2, zoo_pb2_grpc
from blockserve.common.api.leader import leader_name
from blockserve.common.placement.servicer import SERVICE as PLACEMENT_SERVICE
from blockserve.common.placement.servicer import PlacementServicer
from blockserve.common.placement.wishes import WishKeeper
from blockserve.common.rpc.address import is_wildcard
from blockserve.common.rpc.host import RpcHost
from blockserve.common.state.opening import open_store, refuse_unfit
from blockserve.common.state.store import StateStore
from blockserve.controller.metrics import ControllerMetrics
from blockserve.controller.planning.planner import Planner
from blockserve.controller.servicer import ZooServicer
from blockserve.controller.settings import ControllerSettings
from blockzoo.zoo import Zoo

log = logging.getLogger(__name__)

SERVICES = (zoo_pb2.DESCRIPTOR.services_by_name["ZooService"].full_name, PLACEMENT_SERVICE)


class ControllerServer:
    """One controller. `start` it in the event loop that will run it, and `stop` it there.

    Attributes:
        metrics: what is counted, and where it is shown.
    """

    def __init__(self, settings: ControllerSettings) -> None:
        """Make a controller; nothing is opened yet."""
        self.settings = settings
        self.metrics = ControllerMetrics(settings)
        self._host = RpcHost(settings, SERVICES)
        self._servicer: ZooServicer | None = None
        self._store: StateStore | None = None
        self._planner: Planner | None = None

    @property
    def address(self) -> str:
        """Where clients reach it; the real port is known after `start`."""
        return self._host.address

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
        self._host.bind()
        self.metrics.listen()
        zoo = await asyncio.to_thread(lambda: Zoo.open(settings.zoo, create=settings.create_zoo))
        limits = settings.controller.within_messages(settings.max_message_bytes)
        self._servicer = ZooServicer(zoo, limits, on_change=lambda name: log.info("changed name=%s", name))
        self._store = open_store(settings.state)
        await refuse_unfit(self._store)
        self._planner = planner = Planner(
            zoo,
            self._store,
            leader_name(f"{platform.node()}-{secrets.token_hex(4)}", self._advertised()),
            lease_seconds=settings.state.lease_seconds,
            look_seconds=settings.look_seconds,
            replicas=settings.replicas,
        )
        self.metrics.watch(planner)
        keeper = WishKeeper(zoo, lambda: planner.view)
        zoo_pb2_grpc.add_ZooServiceServicer_to_server(self._servicer, self._host.server)
        wishes = PlacementServicer(keeper)
        placement_pb2_grpc.add_PlacementServiceServicer_to_server(wishes, self._host.server)
        await self._host.start()
        planner.start()
        await self._host.say_serving()
        log.info("ready address=%s zoo=%s version=%s", self.address, zoo.url, version("blockzoo"))

    def _advertised(self) -> str:
        """Where routers are told to reach this controller; empty if that is not known."""
        address = self.settings.advertise or self._host.address
        if not is_wildcard(address):
            return address
        log.warning("routers cannot reach %s: set `advertise` to pass calls about the zoo on", address)
        return ""

    async def stop(self) -> None:
        """Stop: leadership first, then calls in progress."""
        await self._host.say_stopping()
        if self._planner is not None:
            await self._planner.stop()
        await self._host.close()
        if self._servicer is not None:
            await self._servicer.close()
        if self._store is not None:
            await self._store.close()
        await asyncio.to_thread(self.metrics.close)
        self._servicer = self._store = self._planner = None
        if self._host.has_started:
            log.info("stopped")

    def remove_own_socket(self) -> None:
        """Take away the socket file, if it is this server's."""
        self._host.remove_own_socket()
