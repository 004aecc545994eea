"""The server's address, and who may call it."""

from __future__ import annotations

import hmac
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from blockserve.common.errors import ConfigurationError, UnauthenticatedError
from blockserve.common.rpc.settings import ServerSettings
from blockserve.common.wire.errors import Handler, abort

SOCKET_MODE = 0o600
_PUBLIC = "/grpc.health.v1.Health/"
"""Health answers without a credential: probes have none, and it tells nothing else."""


def server_options(config: ServerSettings) -> list[tuple[str, int]]:
    """gRPC channel arguments of the server."""
    keepalive, timeout = (
        round(config.keepalive_seconds * 1000),
        round(config.keepalive_timeout_seconds * 1000),
    )
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.keepalive_time_ms", keepalive),
        ("grpc.keepalive_timeout_ms", timeout),
        # Clients probe too; the default would take more than one probe in five minutes for an attack.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Two servers on one port would share its connections between them without a word.
        ("grpc.so_reuseport", 0),
    ]


def enable_reflection(server: grpc.aio.Server, services: Sequence[str]) -> None:
    """Answer gRPC reflection for these services, and for health."""
    from grpc_health.v1 import health
    from grpc_reflection.v1alpha import reflection

    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)


def read_token(config: ServerSettings) -> str | None:
    """The bearer token callers must send, None when none is asked for.

    Raises:
        ConfigurationError: the file cannot be read, or the token is empty.
    """
    if config.token is not None:
        token = config.token.get_secret_value()
    elif config.token_file is not None:
        token = _read(config.token_file).decode().strip()
    else:
        return None
    if not token:
        raise ConfigurationError("the bearer token is empty", hint="Put a long random text into it.")
    return token


def bind(server: grpc.aio.Server, config: ServerSettings) -> str:
    """Bind the server's port.

    Returns:
        The address clients use; with the real port where port 0 was asked for.

    Raises:
        ConfigurationError: the address is taken or not ours, or a TLS file cannot be read.
    """
    is_socket = config.listen.startswith("unix:")
    if is_socket:
        _check_socket_free(Path(config.listen.removeprefix("unix:")))
    # The socket file is born with this mode; a chmod afterwards would leave a moment in which others connect.
    previous = os.umask(0o777 & ~SOCKET_MODE) if is_socket else None
    try:
        port = _add_port(server, config)
    except RuntimeError as error:
        raise ConfigurationError(
            f"cannot listen on {config.listen}",
            hint="Another server may use the address (`blockzoo status`); choose another with --listen.",
            listen=config.listen,
        ) from error
    finally:
        if previous is not None:
            os.umask(previous)
    return config.listen if is_socket else f"{config.listen.rpartition(':')[0]}:{port}"


def remove_socket(address: str) -> None:
    """Take the socket file away after the server has stopped."""
    if address.startswith("unix:"):
        with suppress(FileNotFoundError):
            Path(address.removeprefix("unix:")).unlink()


def _add_port(server: grpc.aio.Server, config: ServerSettings) -> int:
    if config.tls_cert is None or config.tls_key is None:
        return server.add_insecure_port(config.listen)
    authority = _read(config.tls_client_ca) if config.tls_client_ca else None
    credentials = grpc.ssl_server_credentials(
        [(_read(config.tls_key), _read(config.tls_cert))],
        root_certificates=authority,
        require_client_auth=authority is not None,
    )
    return server.add_secure_port(config.listen, credentials)


def _check_socket_free(path: Path) -> None:
    """gRPC replaces whatever socket lies there, even one that another server still answers."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.parent.is_dir():
            return
        raise ConfigurationError(f"the folder {path.parent} does not exist", path=path) from None
    if not stat.S_ISSOCK(mode):
        raise ConfigurationError(f"{path} is there and is not a socket", path=path)
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return
    raise ConfigurationError(
        f"another server answers at {path}", hint="Stop it, or choose another path.", path=path
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}", path=path) from error


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without the bearer token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Pass the call on when it carries the token."""
        if handler_call_details.method.startswith(_PUBLIC):
            return await continuation(handler_call_details)
        for key, value in handler_call_details.invocation_metadata or ():
            given = value.encode() if isinstance(value, str) else value
            # Compared in constant time, or the time taken would spell the token.
            if key == "authorization" and hmac.compare_digest(given, self._expected):
                return await continuation(handler_call_details)
        handler = await continuation(handler_call_details)
        return None if handler is None else _refusing(handler)


def _refusing(handler: Handler) -> Handler:
    async def refuse_unary(request: Any, context: Any) -> Any:
        del request
        await abort(context, _unauthenticated())

    async def refuse_stream(request: Any, context: Any) -> AsyncIterator[Any]:
        await refuse_unary(request, context)
        yield

    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse_stream)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(refuse_unary)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse_stream)
    return grpc.unary_unary_rpc_method_handler(refuse_unary)


def _unauthenticated() -> UnauthenticatedError:
    return UnauthenticatedError(
        "the call carries no valid bearer token", hint="Send it as metadata `authorization: Bearer …`."
    )
