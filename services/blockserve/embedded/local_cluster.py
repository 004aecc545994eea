"""A whole cluster on one machine: a state server, a controller, a router and workers as our own children.

Every child stands behind a guard that ends it when we end, also after kill -9. Workers and controller listen
on Unix sockets in a private folder; only the router has an address that callers use.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockserve.common.errors import ConfigurationError
from blockserve.common.guarded import GuardedChild
from blockserve.common.redis_child import RedisChild

log = logging.getLogger(__name__)

STATE_FILE = "cluster.json"
START_SECONDS = 120.0
"""How long a process may take until it serves; torch alone takes seconds on a busy machine."""
LOOK_SECONDS = 0.2
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Before a child that ended by itself is started again, in seconds; doubled each time it ends soon."""
STABLE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """What to start.

    Attributes:
        folder: private to the cluster: sockets, settings, logs.
        zoo: folder or URL.
        listen: the router's address.
        num_workers: at least 1.
        replicas: workers that hold each variant.
        num_threads: of each worker.
        worker: further settings of each worker's engine.
    """

    folder: Path
    zoo: str
    listen: str
    num_workers: int
    replicas: int = 1
    num_threads: int = 1
    worker: Mapping[str, Any] = field(default_factory=dict)

    def processes(self, state_url: str) -> dict[str, tuple[str, str, dict[str, Any]]]:
        """Name -> verb, address and settings of each process, in the order of their start."""
        common = {"zoo": self.zoo, "state": {"url": state_url}}
        found: dict[str, tuple[str, str, dict[str, Any]]] = {}
        controller = f"unix:{self.folder / 'controller.sock'}"
        found["controller"] = (
            "controller",
            controller,
            {**common, "listen": controller, "replicas": self.replicas, "create_zoo": True},
        )
        for number in range(1, self.num_workers + 1):
            name = f"worker-{number}"
            address = f"unix:{self.folder / name}.sock"
            engine = {"num_threads": self.num_threads, **self.worker}
            found[name] = ("worker", address, {**common, "listen": address, "name": name, "engine": engine})
        found["router"] = ("router", self.listen, {**common, "listen": self.listen})
        return found


@dataclass(slots=True)
class _Child:
    """One process and how often it had to be started."""

    name: str
    verb: str
    address: str
    config: Path
    log: Path
    process: GuardedChild | None = None
    started: float = 0.0
    pause: float = FIRST_PAUSE
    again_at: float = 0.0

    def start(self) -> None:
        command = [sys.executable, "-m", "blockserve.cli", self.verb, "--config", str(self.config)]
        self.process = GuardedChild(command, log=self.log)
        self.started = time.monotonic()


class LocalCluster:
    """The processes of one cluster. Blocking; one thread."""

    def __init__(self, plan: ClusterPlan) -> None:
        """Prepare the folder; nothing is started yet.

        Raises:
            ConfigurationError: a cluster runs in this folder already, or it is open to others.
        """
        self.plan = plan
        plan.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        plan.folder.chmod(0o700)
        running = running_cluster(plan.folder)
        if running is not None:
            raise ConfigurationError(
                f"a cluster runs in {plan.folder} already: pid {running['pid']}, {running['address']}",
                hint="End it with `blockzoo down`, or choose another folder with --dir.",
            )
        self._redis: RedisChild | None = None
        self._children: list[_Child] = []

    def start(self, told: Callable[[str, int, int], None] = lambda _name, _done, _all: None) -> None:
        """Start everything and wait until it serves; `told` hears of each process: name, started, all.

        Raises:
            ConfigurationError: a process did not start; its log says why.
            StateStoreError: there is no program for the state server.
        """
        folder, count = self.plan.folder, self.plan.num_workers + 3
        told("state server", 0, count)
        self._redis = RedisChild(socket_path=folder / "state.sock")
        for name, (verb, address, settings) in self.plan.processes(self._redis.url).items():
            config = folder / f"{name}.yaml"
            config.touch(mode=0o600)  # it holds the password of the state server
            config.write_text(yaml.safe_dump(settings))
            child = _Child(name, verb, address, config, folder / f"{name}.log")
            child.start()
            self._children.append(child)
        for done, child in enumerate(self._children, 1):
            told(child.name, done, count)
            self._wait_until_it_serves(child)
        self._write_state()

    def look(self) -> list[str]:
        """Start again what has ended by itself; a line for people about each such event."""
        lines: list[str] = []
        now = time.monotonic()
        for child in self._children:
            if child.process is not None and not child.process.is_running:
                if now - child.started > STABLE_SECONDS:
                    child.pause = FIRST_PAUSE
                child.process.stop()
                child.process, child.again_at = None, now + child.pause
                lines.append(f"{child.name} has ended; it is started again in {child.pause:g} s")
                child.pause = min(2 * child.pause, LONGEST_PAUSE)
            elif child.process is None and now >= child.again_at:
                child.start()
                lines.append(f"{child.name} is started again")
        return lines

    def stop(self) -> None:
        """End everything in order: the router lets answers end first, the state server goes last."""
        for child in reversed(self._children):
            if child.process is not None:
                child.process.stop()
                child.process = None
        self._children.clear()
        if self._redis is not None:
            self._redis.stop()
            self._redis = None
        (self.plan.folder / STATE_FILE).unlink(missing_ok=True)

    def _wait_until_it_serves(self, child: _Child) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if child.process is None or not child.process.is_running:
                break
            if serves(child.address):
                return
            time.sleep(LOOK_SECONDS)
        tail = child.log.read_text(errors="replace")[-1500:] if child.log.exists() else ""
        raise ConfigurationError(
            f"{child.name} did not start:\n{tail}", hint=f"Its log is {child.log}.", process=child.name
        )

    def _write_state(self) -> None:
        state = {
            "pid": os.getpid(),
            "started": process_start(os.getpid()),
            "address": self.plan.listen,
            "processes": {
                child.name: child.process.pid for child in self._children if child.process is not None
            },
        }
        path = self.plan.folder / STATE_FILE
        path.with_suffix(".new").write_text(json.dumps(state))
        path.with_suffix(".new").replace(path)


def serves(address: str) -> bool:
    """Whether a process says SERVING at an address."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1.0)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def running_cluster(folder: Path) -> dict[str, Any] | None:
    """What runs in a folder; None when nothing does, whatever a crash has left there."""
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        alive = process_start(int(state["pid"])) == state["started"] is not None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return state if alive else None


def process_start(pid: int) -> str | None:
    """When a process began, in the kernel's ticks: with it a process id names one process for good."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()[19]
