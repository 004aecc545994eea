"""What a gRPC server listens on: its address, TLS, connections, reflection."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

import grpc

from blockserve.common.errors import ConfigurationError
from blockserve.common.rpc.certificates import check_authorities, check_pair
from blockserve.common.rpc.files import read_file
from blockserve.common.rpc.settings import ServerSettings

SOCKET_MODE = 0o600
OTHER = "Choose another address with --listen."
LEAST_PROBE_MS = 5_000
"""Clients that probe more often are sent away (`channel.KEEPALIVE_MS`)."""
MAX_PENDING_CALLS = 50_000
"""Some kilobytes each; their messages are not read yet."""


def server_options(settings: ServerSettings) -> list[tuple[str, int]]:
    """gRPC channel arguments of the server."""
    keepalive, timeout = (
        round(settings.keepalive_seconds * 1000),
        round(settings.keepalive_timeout_seconds * 1000),
    )
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.keepalive_time_ms", keepalive),
        ("grpc.keepalive_timeout_ms", timeout),
        # Without it, an answer to a probe may take a minute; see `channel`.
        ("grpc.http2.ping_timeout_ms", timeout),
        # Clients probe too; the default would take more than one probe in five minutes for an attack, and end
        # calls on which the server is silent. gRPC's documentation has another name for it (min_recv_ping),
        # and gRPC ignores names that it does not know.
        ("grpc.http2.min_ping_interval_without_data_ms", LEAST_PROBE_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        # Two servers on one port would share its connections between them without a word.
        ("grpc.so_reuseport", 0),
        # Calls that wait for the event loop. Beyond 1000, gRPC would cancel some without a word; like this
        # each of a burst is refused with the reason and a time to try again.
        ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
    ]


def bind(server: grpc.aio.Server, settings: ServerSettings) -> str:
    """Bind the server's port.

    Returns:
        The address clients use; with the real port where port 0 was asked for.

    Raises:
        ConfigurationError: the address is taken or not ours, or a TLS file cannot be read.
    """
    is_socket = settings.listen.startswith("unix:")
    check_free(settings.listen)
    # The socket file is born with this mode; a chmod afterwards would leave a moment in which others connect.
    previous = os.umask(0o777 & ~SOCKET_MODE) if is_socket else None
    try:
        port = _add_port(server, settings)
    except RuntimeError as error:
        raise ConfigurationError(
            f"cannot listen on {settings.listen}",
            hint="Choose another address with --listen.",
            listen=settings.listen,
        ) from error
    finally:
        if previous is not None:
            os.umask(previous)
    return settings.listen if is_socket else f"{settings.listen.rpartition(':')[0]}:{port}"


def check_free(listen: str) -> None:
    """Find out whether an address can be listened on; gRPC says why not in its log only.

    Args:
        listen: `host:port`, or `unix:/path`.

    Raises:
        ConfigurationError: another process has it, or it is not ours to have.
    """
    if listen.startswith("unix:"):
        _check_socket_free(Path(listen.removeprefix("unix:")))
        return
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As gRPC does: a port whose connections are closing is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen(1)
    except socket.gaierror as error:
        raise ConfigurationError(
            f"cannot listen on {listen}: the name {host} is not known", hint=OTHER, listen=listen
        ) from error
    except OSError as error:
        message, hint = _describe_taken(listen, error)
        raise ConfigurationError(message, hint=hint, listen=listen) from error


def _describe_taken(listen: str, error: OSError) -> tuple[str, str]:
    if error.errno == errno.EADDRINUSE:
        return f"another process listens on {listen} already", f"Stop it if it is yours. {OTHER}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"cannot listen on {listen}: this machine has no such address", OTHER
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"cannot listen on {listen}: ports below 1024 belong to the system", OTHER
    return f"cannot listen on {listen}: {error.strerror}", OTHER


def remove_socket(address: str) -> None:
    """Take the socket file away after the server has stopped."""
    if address.startswith("unix:"):
        with suppress(FileNotFoundError):
            Path(address.removeprefix("unix:")).unlink()


def _add_port(server: grpc.aio.Server, settings: ServerSettings) -> int:
    if settings.tls_cert is None or settings.tls_key is None:
        return server.add_insecure_port(settings.listen)
    check_pair(settings.tls_cert, settings.tls_key)
    if settings.tls_client_ca is not None:
        check_authorities(settings.tls_client_ca)
    authority = read_file(settings.tls_client_ca) if settings.tls_client_ca else None
    credentials = grpc.ssl_server_credentials(
        [(read_file(settings.tls_key), read_file(settings.tls_cert))],
        root_certificates=authority,
        require_client_auth=authority is not None,
    )
    return server.add_secure_port(settings.listen, credentials)


def _check_socket_free(path: Path) -> None:
    """gRPC replaces whatever socket lies there, even one that another server still answers."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.parent.is_dir():
            return
        raise ConfigurationError(f"the folder {path.parent} does not exist", path=path) from None
    if not stat.S_ISSOCK(mode):
        raise ConfigurationError(f"{path} exists and is not a socket", path=path)
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return
    raise ConfigurationError(
        f"another server answers at {path}", hint=f"Stop that server. {OTHER}", path=path
    )
