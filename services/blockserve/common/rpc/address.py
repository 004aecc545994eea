"""Addresses of servers: `host:port` or `unix:/path/to/socket`."""

from __future__ import annotations

import ipaddress

from blockserve.common.errors import ConfigurationError

DEFAULT_TARGET = "127.0.0.1:7450"
"""Where a server listens, and a client looks for it, when nobody says otherwise."""


GRPC_SCHEMES = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:", "vsock:", "xds:")
"""What gRPC itself resolves; programs may name several servers so."""

DNS_PORT = 443
"""Which port gRPC takes when a target that begins with `dns:` names none."""


def is_local(address: str) -> bool:
    """Whether an address (`host:port`, `unix:/path`, `unix-abstract:name`) is of this machine only."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].strip("[]") or address
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_wildcard(address: str) -> bool:
    """Whether an address means every interface of a machine: one listens there, nobody can call it."""
    try:
        return ipaddress.ip_address(address.rpartition(":")[0].strip("[]")).is_unspecified
    except ValueError:
        return False


def is_host_and_port(address: str) -> bool:
    """Whether an address has the form host:port."""
    host, _, port = address.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and int(port) <= 65535


def endpoint(target: str) -> tuple[str, int] | str | None:
    """Where a connection to a target goes, as sockets name it.

    Returns:
        (host, port); or the path of a Unix socket, which begins with NUL if it is an abstract one; or None
        for a target that names several servers, or that only gRPC can resolve.
    """
    scheme = next((scheme for scheme in GRPC_SCHEMES if target.startswith(scheme)), "")
    rest = target.removeprefix(scheme)
    if scheme == "unix-abstract:":
        return "\0" + rest
    if scheme == "unix:":
        return rest.removeprefix("//")
    if scheme == "dns:":
        rest = rest.rpartition("/")[2]  # what stands before it names the DNS server
        if rest and ":" not in rest:
            return rest, DNS_PORT
    is_bare_ipv6 = scheme == "ipv6:" and not rest.startswith("[")
    if scheme in ("vsock:", "xds:") or "," in rest or is_bare_ipv6 or not is_host_and_port(rest):
        return None
    host, _, port = rest.rpartition(":")
    return host.strip("[]"), int(port)


def check_target(target: str) -> None:
    """Refuse what clients cannot call: a URL of the web, or a host without its port.

    Raises:
        ConfigurationError: the sentence says how the address is written.
    """
    scheme, colon, rest = target.partition("://")
    if colon and scheme in ("http", "https"):
        host = rest.partition("/")[0] or "host"
        address = host if is_host_and_port(host) else f"{host}:PORT"
        raise ConfigurationError(
            f"{target} is a URL; the address of a server is host:port",
            hint=f"The protocol is gRPC: give {address}."
            + (" Encryption is chosen with --tls or --ca-file." if scheme == "https" else ""),
            address=target,
        )
    if target.startswith(GRPC_SCHEMES) or is_host_and_port(target):
        return
    raise ConfigurationError(
        f"{target!r} is no address of a server",
        hint="Write host:port, as in models.example:7450, or unix:/path/to/socket.",
        address=target,
    )
