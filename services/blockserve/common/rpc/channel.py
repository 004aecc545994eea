"""Credentials and connections of clients."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import grpc

from blockserve.common.errors import ConfigurationError
from blockserve.common.rpc.address import check_target, is_local
from blockserve.common.rpc.files import read_file

KEEPALIVE_MS = 10_000
"""Interval of probes on a silent connection with calls; see `listen.LEAST_PROBE_MS`."""
KEEPALIVE_TIMEOUT_MS = 10_000
"""How long an answer to a probe may take. A connection of which one direction is dead ends after both
times together, even where a proxy or the kernel of a frozen peer acknowledges every byte."""
MAX_MESSAGE_BYTES = 64 << 20

_OPTIONS = [
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # The keepalive timeout only says how long a kernel may wait for an acknowledgement (TCP_USER_TIMEOUT);
    # for the answer to a probe, gRPC waits a minute unless this is set (grpc/grpc#39239).
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # Without it, gRPC sends two probes between two messages of ours and then one a minute.
    ("grpc.http2.max_pings_without_data", 0),
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
        insecure: send the token over a plain connection to another machine all the same; for programs only.
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
        return self.tls or self.ca_file is not None or self.cert_file is not None or self.key_file is not None

    def check(self) -> None:
        """Hold the files together, which gRPC does only while it connects, or not at all.

        Raises:
            ConfigurationError: a file cannot be read, one of two is missing, or the key does not fit.
        """
        if (self.cert_file is None) != (self.key_file is None):
            lacking = "private key (key_file)" if self.key_file is None else "certificate (cert_file)"
            raise ConfigurationError(
                f"a client certificate and its private key belong together: the {lacking} is missing",
                hint="Give both, --cert-file and --key-file.",
            )
        if not self.is_encrypted:
            return
        # The standard library's ssl takes a while to import, and most connections are plain.
        from blockserve.common.rpc.certificates import check_authorities, check_pair

        if self.ca_file is not None:
            check_authorities(self.ca_file)
        if self.cert_file is not None and self.key_file is not None:
            check_pair(self.cert_file, self.key_file)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call carries."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)


def open_channel(target: str, credentials: Credentials, *, reconnects_soon: bool = False) -> grpc.aio.Channel:
    """A channel for event loops; it connects on first use.

    Args:
        target: `host:port`, or `unix:/path`.
        credentials: TLS and token.
        reconnects_soon: look for a lost server every second; gRPC would wait for up to two minutes.

    Raises:
        ConfigurationError: a token would travel readable, or a file cannot be read.
    """
    tls = _check(target, credentials)
    options = [*_OPTIONS, *_RECONNECT] if reconnects_soon else _OPTIONS
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, tls, options=options)


def open_blocking_channel(target: str, credentials: Credentials) -> grpc.Channel:
    """A channel for threads that reconnects quickly; otherwise as `open_channel`."""
    tls = _check(target, credentials)
    options = [*_OPTIONS, *_RECONNECT]
    if tls is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, tls, options=options)


def _check(target: str, credentials: Credentials) -> grpc.ChannelCredentials | None:
    """What encrypts the connection, None for a plain one."""
    check_target(target)
    credentials.check()
    if credentials.is_encrypted:
        return grpc.ssl_channel_credentials(
            _pem(credentials.ca_file), _pem(credentials.key_file), _pem(credentials.cert_file)
        )
    if credentials.token is not None and not (credentials.insecure or is_local(target)):
        raise ConfigurationError(
            f"the token would be sent unencrypted to {target}",
            hint="Encrypt the connection (--tls, --ca-file).",
        )
    return None


def _pem(path: Path | None) -> bytes | None:
    return None if path is None else read_file(path)
