"""Addresses of servers: `host:port` or `unix:/path/to/socket`."""

from __future__ import annotations

import ipaddress

DEFAULT_TARGET = "127.0.0.1:7450"
"""Where a server listens, and a client looks for it, when nobody says otherwise."""


def is_local(address: str) -> bool:
    """Whether an address (`host:port`, `unix:/path`) can only be reached from this machine."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]") or address
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_host_and_port(address: str) -> bool:
    """Whether an address has the form host:port."""
    host, _, port = address.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and int(port) <= 65535
