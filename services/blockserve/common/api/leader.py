"""How the leading controller calls itself in the shared state: a name, and where routers reach it; pure."""

from __future__ import annotations


def leader_name(name: str, address: str) -> str:
    """What a controller that wants to lead writes into the shared state.

    Args:
        name: of one life of the process.
        address: where routers reach it; `host:port` or `unix:/path`.
    """
    return f"{name} {address}"


def leader_address(leader: str) -> str:
    """Where the leader is reached; "" of one that did not say, as before version 0.2."""
    return leader.partition(" ")[2]
