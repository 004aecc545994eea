"""Settings of the embedded server. docs/configuration.md is made from these models."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from blockserve.common.channel import is_local
from blockserve.common.config import setting
from blockserve.common.server_settings import ServerSettings, is_host_and_port
from blockserve.controller.config import ControllerConfig
from blockserve.router.config import RouterConfig
from blockserve.worker.config import EngineConfig

ALL = "all"
"""In `preload`: every variant of the zoo."""
OFF = "off"
"""As `metrics_listen`: no metrics endpoint."""


class ServeConfig(ServerSettings):
    """Settings of `blockzoo serve`."""

    zoo: str = setting(
        "~/.blockzoo",
        "The zoo to serve: a folder, or a URL such as s3://bucket/zoo.",
        reason="What the other commands use too.",
    )
    create_zoo: bool = setting(
        False,
        "Begin an empty zoo when there is none.",
        reason="A wrong path is an error; with it, a new server can be filled from elsewhere.",
    )
    preload: tuple[str, ...] = setting(
        (),
        f"Variants whose blocks are read at the start; `{ALL}` means every variant.",
        reason="Others are read by their first request, which waits for it.",
    )
    pin: tuple[str, ...] = setting(
        (),
        "Variants whose blocks are read at the start and stay when others need room (`engine.block_bytes`).",
        reason="What must answer at once, always; everything else comes and goes with its use.",
    )
    stall_seconds: float = setting(
        60.0,
        "How long work may wait without a pass being finished before health says NOT_SERVING.",
        unit="seconds",
        reason="Far longer than a full pass on a slow CPU; what takes longer hangs.",
        gt=0,
    )
    health_seconds: float = setting(
        1.0,
        "How often the engine's progress is looked at.",
        unit="seconds",
        reason="Small against `stall_seconds`, and costs nothing.",
        gt=0,
    )
    metrics_listen: str = setting(
        "127.0.0.1:7451",
        f"Where Prometheus reads metrics over HTTP: `host:port` (port 0 picks a free one), or `{OFF}`.",
        reason="Only this machine reaches it. If the port is taken and nobody chose it, a free one is used.",
    )
    metrics_public: bool = setting(
        False,
        "Let `metrics_listen` be an address others can reach; metrics are plain HTTP without a credential.",
        reason="Metrics tell the names of variants and how much each is used.",
    )
    metrics_model_name: str = setting(
        "blockzoo",
        "The label `model_name` of metrics that are about the engine and no single variant.",
        reason="vLLM's metrics all have the label; scalers read these without looking at it.",
        min_length=1,
    )
    metrics_max_labels: int = setting(
        1000,
        "Most variants, and segments, with time series of their own; the others share the label `other`.",
        reason="Each costs a hundred series; a scrape of a thousand takes a core about a second.",
        ge=0,
    )
    router: RouterConfig = Field(default_factory=RouterConfig, description="Limits on requests.")
    controller: ControllerConfig = Field(
        default_factory=ControllerConfig, description="Registering over the network."
    )
    engine: EngineConfig = Field(default_factory=EngineConfig, description="Memory, batching, device.")

    @model_validator(mode="after")
    def _check_metrics(self) -> Self:
        if self.metrics_listen == OFF:
            return self
        if not is_host_and_port(self.metrics_listen):
            raise ValueError(f"metrics_listen: {self.metrics_listen!r} is neither host:port nor {OFF}")
        if not (is_local(self.metrics_listen) or self.metrics_public):
            raise ValueError(
                f"{self.metrics_listen} can be reached from other machines: say metrics_public if metrics may"
            )
        return self
