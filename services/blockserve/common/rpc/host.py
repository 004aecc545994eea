"""The gRPC server of a process: what router, worker, controller and embedded server have in common.

A process calls, in this order:

1. `bind` takes the address; one that is in use is found out before any long work.
2. `add_..._to_server(servicer, host.server)` for each of its servicers.
3. `start` answers calls; health says NOT_SERVING.
4. `say_serving`, or `health.watch`, says SERVING.
5. `say_stopping` says NOT_SERVING for good; then the process ends its own work.
6. `close` ends the calls that are left and lets go of the address.

A start that fails goes on with 5 and 6, wherever it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from blockserve.common.rpc.health import NOT_SERVING, SERVING, HealthReporter
from blockserve.common.rpc.interceptors import ErrorInterceptor, TokenInterceptor
from blockserve.common.rpc.listen import bind, remove_socket, server_options
from blockserve.common.rpc.reflection import enable_reflection
from blockserve.common.rpc.settings import ServerSettings, read_token

CLOSE_SECONDS = 2.0
"""How long calls may take to end once the process has no work left for them."""


class RpcHost:
    """A gRPC server with its address, token, errors, health and reflection. Runs once, in one event loop.

    Attributes:
        address: where clients reach it, with the real port once it is bound.
        health: what `grpc.health.v1` says of the process.
    """

    def __init__(
        self, settings: ServerSettings, services: Sequence[str], *, close_seconds: float = CLOSE_SECONDS
    ) -> None:
        """Prepare; nothing is opened yet.

        Args:
            settings: of the process.
            services: full names of the gRPC services, for health and reflection.
            close_seconds: how long calls may go on once `close` has begun.
        """
        self.address = settings.listen
        self.health = HealthReporter(tuple(services))
        self._settings = settings
        self._services = tuple(services)
        self._close_seconds = close_seconds
        self._server: grpc.aio.Server | None = None
        self._is_bound = self._is_started = False

    @property
    def server(self) -> grpc.aio.Server:
        """The server that servicers are added to, between `bind` and `close`."""
        assert self._server is not None
        return self._server

    @property
    def has_started(self) -> bool:
        """Whether it has ever answered calls."""
        return self._is_started

    def bind(self) -> None:
        """Make the server and take its address.

        Raises:
            ConfigurationError: the address cannot be used, or a file of the settings cannot be read.
        """
        token = read_token(self._settings)
        interceptors: list[grpc.aio.ServerInterceptor] = [ErrorInterceptor()]
        if token is not None:
            interceptors.insert(0, TokenInterceptor(token))
        self._server = grpc.aio.server(interceptors=interceptors, options=server_options(self._settings))
        self.address = bind(self._server, self._settings)
        self._is_bound = True

    async def start(self) -> None:
        """Answer calls from now on, health and reflection among them; health says NOT_SERVING."""
        self.health.add_to(self.server)
        if self._settings.serves_reflection:
            enable_reflection(self.server, self._services)
        await self.health.set(NOT_SERVING)
        await self.server.start()
        self._is_started = True

    async def say_serving(self) -> None:
        """Let health say SERVING."""
        await self.health.set(SERVING)

    async def say_stopping(self) -> None:
        """Let health say NOT_SERVING for good; calls are still answered."""
        await self.health.stop()

    async def close(self) -> None:
        """Take no more calls, end those that run after `close_seconds`, let go of the address."""
        if self._server is None:
            return
        if self._is_bound and not self._is_started:
            # gRPC lets go of a port only when a server that was started is stopped.
            await self._server.start()
        await self._server.stop(self._close_seconds)
        self.remove_own_socket()
        self._server = None
        self._is_bound = False

    def remove_own_socket(self) -> None:
        """Take away the socket file, if it is this server's: at a failed start another's may lie there."""
        if self._is_bound:
            remove_socket(self.address)
