"""Which processes a local cluster has and what each is told; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from blockserve.common.errors import ConfigurationError
from blockserve.common.metrics.settings import OFF
from blockserve.local.layout import Layout

STATE = "state"
CONTROLLER = "controller"
ROUTER = "router"
WORKER = "worker"

BLOCK_SHARE = 0.5
"""Of the memory, for blocks of all workers; the rest is for KV pages, activations and everybody else."""
KV_SHARE = 0.2
"""Of the memory, at most, for KV pages of all workers."""
MAX_KV_BYTES = 1 << 30
"""For one worker: what a server alone takes by default."""
MAX_PORT = 65535
"""Of TCP."""
_OF_ANOTHER_STATE = ("URL", "PASSWORD_FILE", "SENTINEL_PASSWORD_FILE", "CA_FILE", "CERT_FILE", "KEY_FILE")
_OF_THE_ROUTER = ("TLS_CERT", "TLS_KEY", "TLS_CLIENT_CA")


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to run.

    Attributes:
        name: among the processes of its cluster.
        service: STATE, or the package of `blockserve` that runs.
        fixed: environment variables that are so, whatever else is said.
        defaults: environment variables that are so unless our own environment says otherwise.
    """

    name: str
    service: str
    fixed: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)

    def environment(self, inherited: Mapping[str, str], state_url: str) -> dict[str, str]:
        """All environment variables of the process.

        Args:
            inherited: our own: what people set for all processes.
            state_url: where the processes meet.
        """
        dropped = {f"BLOCKZOO_STATE_{name}" for name in _OF_ANOTHER_STATE}
        dropped |= {"BLOCKZOO_ADVERTISE", "BLOCKZOO_PEER_CA"}
        if self.service != ROUTER:
            # They listen on sockets that only we can open, where nothing has to be encrypted.
            dropped |= {f"BLOCKZOO_{name}" for name in _OF_THE_ROUTER}
        kept = {name: value for name, value in inherited.items() if name not in dropped}
        return {**self.defaults, **kept, **self.fixed, "BLOCKZOO_STATE_URL": state_url}


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """The processes of a local cluster.

    Attributes:
        zoo: what it serves.
        state, controller, router, workers: the processes.
    """

    zoo: str
    state: ProcessSpec
    controller: ProcessSpec
    router: ProcessSpec
    workers: tuple[ProcessSpec, ...]

    @property
    def stop_order(self) -> tuple[tuple[ProcessSpec, ...], ...]:
        """Groups of processes; each ends before the next is told to.

        The router lets answers end first, which takes everybody else.
        """
        return (self.router,), self.workers, (self.controller,), (self.state,)


def make_plan(
    layout: Layout,
    *,
    zoo: str,
    listen: str,
    num_workers: int,
    cores: int,
    memory_bytes: int,
    metrics_listen: str = OFF,
) -> ClusterPlan:
    """Share a machine among workers.

    Args:
        layout: where sockets lie.
        zoo: folder or URL that all processes open.
        listen: where the router listens.
        num_workers: how many workers, at least 1.
        cores: of the machine.
        memory_bytes: of the machine.
        metrics_listen: where the router shows its metrics; see `metrics_addresses`.

    Raises:
        ConfigurationError: there are not so many ports.
    """
    share = {
        "BLOCKZOO_ENGINE_NUM_THREADS": str(max(1, cores // num_workers)),
        "BLOCKZOO_ENGINE_BLOCK_BYTES": str(int(memory_bytes * BLOCK_SHARE) // num_workers),
        "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(min(MAX_KV_BYTES, int(memory_bytes * KV_SHARE) // num_workers)),
    }

    names = [f"worker-{number}" for number in range(1, num_workers + 1)]
    metrics = metrics_addresses(metrics_listen, (ROUTER, CONTROLLER, *names))

    def fixed(name: str) -> dict[str, str]:
        return {
            "BLOCKZOO_ZOO": zoo,
            "BLOCKZOO_LISTEN": f"unix:{layout.socket(name)}",
            "BLOCKZOO_METRICS_LISTEN": metrics[name],
        }

    return ClusterPlan(
        zoo,
        ProcessSpec(STATE, STATE),
        ProcessSpec(CONTROLLER, CONTROLLER, fixed(CONTROLLER)),
        ProcessSpec(
            ROUTER, ROUTER, {**fixed(ROUTER), "BLOCKZOO_LISTEN": listen}, {"BLOCKZOO_ZOO_CALLS": "true"}
        ),
        tuple(ProcessSpec(name, WORKER, {**fixed(name), "BLOCKZOO_NAME": name}, share) for name in names),
    )


def metrics_addresses(listen: str, names: Sequence[str]) -> dict[str, str]:
    """Where each process shows its metrics: the first at `listen`, each further one a port higher.

    Args:
        listen: `host:port`, of which port 0 gives every process a free one, or `OFF`.
        names: of the processes.

    Raises:
        ConfigurationError: there are not so many ports.
    """
    host, _, port = listen.rpartition(":")
    if listen == OFF or int(port) == 0:
        return dict.fromkeys(names, listen)
    if int(port) + len(names) - 1 > MAX_PORT:
        raise ConfigurationError(
            f"{len(names)} processes have no ports from {port} on for their metrics",
            hint="Choose a lower port with --metrics-listen, or 0 for free ones.",
            listen=listen,
        )
    return {name: f"{host}:{int(port) + place}" for place, name in enumerate(names)}


def next_delay(previous: float, ran_seconds: float) -> float:
    """Seconds to wait before a process is started again.

    Args:
        previous: what this gave the last time, 0 at first.
        ran_seconds: how long the process ran.
    """
    if ran_seconds > 60 or previous == 0:
        return 0.5
    return min(30.0, 2 * previous)
