"""Credentials and connections of clients."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import grpc

from blockserve.common.errors import ConfigurationError
from blockserve.common.rpc.address import is_local
from blockserve.common.rpc.files import read_file

KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000
MAX_MESSAGE_BYTES = 64 << 20

_OPTIONS = [
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A connection of its own: otherwise clients of one process share a broken one.
    ("grpc.use_local_subchannel_pool", 1),
]
_RECONNECT = [
    # gRPC would wait for up to two minutes; who resumes has a back-off of its own.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # In spite of its name also the time a connection has to come about; a busy machine needs a while.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


@dataclass(frozen=True, slots=True)
class Credentials:
    """How a client proves itself and checks the server.

    Attributes:
        token: bearer token.
        tls: encrypt, trusting the system's authorities.
        ca_file: encrypt, trusting this authority (PEM) instead.
        cert_file: the client's own certificate (PEM), with `key_file`.
        key_file: its private key (PEM).
        insecure: send the token over a plain connection to another machine all the same.
    """

    token: str | None = field(default=None, repr=False)
    tls: bool = False
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    insecure: bool = False

    @property
    def is_encrypted(self) -> bool:
        """Whether the connection uses TLS."""
        return self.tls or self.ca_file is not None or self.cert_file is not None

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call carries."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)


def open_channel(target: str, credentials: Credentials) -> grpc.aio.Channel:
    """A channel for event loops; it connects on first use.

    Raises:
        ConfigurationError: a token would travel readable, or a file cannot be read.
    """
    tls = _check(target, credentials)
    if tls is None:
        return grpc.aio.insecure_channel(target, options=_OPTIONS)
    return grpc.aio.secure_channel(target, tls, options=_OPTIONS)


def open_blocking_channel(target: str, credentials: Credentials) -> grpc.Channel:
    """A channel for threads that reconnects quickly; otherwise as `open_channel`."""
    tls = _check(target, credentials)
    options = [*_OPTIONS, *_RECONNECT]
    if tls is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, tls, options=options)


def _check(target: str, credentials: Credentials) -> grpc.ChannelCredentials | None:
    """What encrypts the connection, None for a plain one."""
    if credentials.is_encrypted:
        return grpc.ssl_channel_credentials(
            _pem(credentials.ca_file), _pem(credentials.key_file), _pem(credentials.cert_file)
        )
    if credentials.token is not None and not (credentials.insecure or is_local(target)):
        raise ConfigurationError(
            f"the token would be sent unencrypted to {target}", hint="Use TLS, or pass insecure=True."
        )
    return None


def _pem(path: Path | None) -> bytes | None:
    return None if path is None else read_file(path)
