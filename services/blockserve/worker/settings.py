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
        reason="Workers are found through the shared state, so any free port will do.",
    )
    name: str = setting(
        "",
        "The worker's name, the same after a restart; empty takes the host's name and the port.",
        reason="People and manual placement name workers by it.",
        max_length=200,
    )
    advertise: str = setting(
        "",
        "The address that others reach this worker at; empty is where it listens.",
        reason="In a container they differ.",
    )
    window_bytes: int = setting(
        8 << 20,
        "Hidden states that may wait at another worker before this one sends it more.",
        unit="bytes",
        reason="A few prompt chunks of a large model: enough to hide the hop, little beside the blocks.",
        ge=1 << 16,
    )
    engine: EngineConfig = Field(default_factory=EngineConfig, description="Memory, batching, device.")
