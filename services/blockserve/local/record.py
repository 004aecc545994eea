"""What runs, written down: for `blockzoo down`, and for whoever starts a cluster where one runs."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blockserve.common.errors import LocalClusterError
from blockserve.local.identity import ProcessIdentity, is_alive

FORMAT = 1


@dataclass(frozen=True, slots=True)
class RecordedProcess:
    """One process of the cluster.

    Attributes:
        name: "state", "controller", "router", "worker-1", ...
        identity: which process it is.
        address: where it listens; "" while it starts.
    """

    name: str
    identity: ProcessIdentity
    address: str = ""


@dataclass(frozen=True, slots=True)
class ClusterRecord:
    """A cluster as its owner last wrote it down.

    Attributes:
        owner: the `blockzoo up` that runs it.
        zoo: what it serves.
        address: of the router; "" until everything has started.
        processes: what the owner has started and not ended.
        stop_seconds: how long the owner may take to end everything in order.
    """

    owner: ProcessIdentity
    zoo: str
    address: str = ""
    processes: tuple[RecordedProcess, ...] = ()
    stop_seconds: float = 0.0

    def describe(self) -> str:
        """One line for people."""
        state = f"on {self.address}" if self.address else "starting"
        alive = [f"{one.name} {one.identity.pid}" for one in self.processes if is_alive(one.identity)]
        return f"{state}, zoo {self.zoo}, pid {self.owner.pid} ({', '.join(alive)})"


def write(path: Path, record: ClusterRecord) -> None:
    """Replace what is written there, in one step."""
    fresh = path.with_suffix(".new")
    handle = os.open(fresh, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **asdict(record)}, file, indent=2)
    fresh.replace(path)


def read(path: Path) -> ClusterRecord | None:
    """What is written there, None when nothing is.

    Raises:
        LocalClusterError: it cannot be understood.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _unreadable(path) from error
    try:
        if value["format"] != FORMAT:
            raise _unreadable(path)
        return ClusterRecord(
            _identity(value["owner"]),
            str(value["zoo"]),
            str(value["address"]),
            tuple(
                RecordedProcess(str(one["name"]), _identity(one["identity"]), str(one["address"]))
                for one in value["processes"]
            ),
            float(value["stop_seconds"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(path) from error


def _identity(value: Any) -> ProcessIdentity:
    return ProcessIdentity(int(value["pid"]), int(value["started"]), str(value["boot"]))


def _unreadable(path: Path) -> LocalClusterError:
    return LocalClusterError(
        f"{path} is not a readable list of processes",
        hint="The file is from another version, or damaged: check it, then delete it.",
    )
