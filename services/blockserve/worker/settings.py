"""Settings of `blockzoo worker`. docs/configuration.md is made from these models."""

from __future__ import annotations

from pydantic import Field

from blockserve.common.process.settings import ClusterSettings
from blockserve.common.settings import setting
from blockserve.worker.limits import EngineConfig


class WorkerSettings(ClusterSettings):
    """Settings of one worker."""

    listen: str = setting(
        "127.0.0.1:0",
        "Where to listen: `host:port` (port 0 picks a free one) or `unix:/path/to/socket`.",
        reason="Any free port works: workers are found through the shared state.",
    )
    name: str = setting(
        "",
        "The worker's name, which stays the same after a restart. Empty: the name of the host and the port.",
        reason="Operators name workers by it, for example in `blockzoo place`.",
        max_length=200,
    )
    advertise: str = setting(
        "",
        "The address at which other processes reach this worker. Empty: the address where it listens.",
        reason="In a container the two differ.",
    )
    window_bytes: int = setting(
        8 << 20,
        "Maximum bytes of hidden states that wait at another worker; beyond that this worker sends no more.",
        unit="bytes",
        reason="A few prompt chunks of a large model: enough to hide the hop, little compared with the "
        "blocks.",
        ge=1 << 16,
    )
    max_failed_passes: int = setting(
        16,
        "Number of different requests whose passes may fail within a minute while no pass succeeds; with one "
        "more the worker gives its requests back and ends with status 1, so that whoever started it starts "
        "it again. 0 turns this off.",
        unit="requests",
        reason="Routers try a failed request elsewhere and avoid the worker after two; one where nothing "
        "succeeds any more lacks memory or is broken, and only a new process can help.",
        ge=0,
        le=200,
    )
    engine: EngineConfig = Field(default_factory=EngineConfig, description="Memory, batching, device.")
