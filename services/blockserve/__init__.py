"""Serving of block zoos: clients here, servers in `embedded`, `router`, `worker` and `controller`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockserve.client.aio import AsyncClient
    from blockserve.client.blocking import Client
    from blockserve.client.zoo import RemoteZoo
    from blockserve.common.rpc.channel import Credentials

__all__ = ["AsyncClient", "Client", "Credentials", "RemoteZoo", "__version__"]

_HOMES = {
    "AsyncClient": "client.aio",
    "Client": "client.blocking",
    "Credentials": "common.rpc.channel",
    "RemoteZoo": "client.zoo",
}


def __getattr__(name: str) -> Any:
    """Import on first use: gRPC takes longer to import than a help text takes to print."""
    if name == "__version__":
        from importlib import metadata

        return metadata.version("blockzoo")
    if name in _HOMES:
        from importlib import import_module

        from blockzoo.extras import named_extras

        # RemoteZoo reads and cuts what it pushes, as the zoo does.
        with named_extras():
            return getattr(import_module(f"blockserve.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
