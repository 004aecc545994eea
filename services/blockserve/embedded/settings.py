"""Settings of the embedded server. docs/configuration.md is made from these models."""

from __future__ import annotations

from pydantic import Field

from blockserve.common.metrics.settings import METRICS_LISTEN_MEANING, MetricsSettings
from blockserve.common.settings import setting
from blockserve.controller.push.limits import ControllerConfig
from blockserve.router.limits import RouterConfig, UnregisteredSettings
from blockserve.worker.limits import EngineConfig

ALL = "all"
"""In `preload`: every variant of the zoo."""


class EmbeddedSettings(MetricsSettings, UnregisteredSettings):
    """Settings of `blockzoo serve`."""

    zoo: str = setting(
        "~/.blockzoo",
        "The zoo to serve: a folder, or a URL such as s3://bucket/zoo.",
        reason="The default of the other commands.",
    )
    create_zoo: bool = setting(
        False,
        "Create an empty zoo if there is none.",
        reason="Without it, a wrong path is an error. With it, a new server can be filled from other "
        "machines.",
    )
    preload: tuple[str, ...] = setting(
        (),
        f"Variants whose blocks are loaded at the start; `{ALL}` means every variant.",
        reason="Other variants are loaded by their first request, which waits for that.",
    )
    pin: tuple[str, ...] = setting(
        (),
        "Variants whose blocks are loaded at the start and stay when others need room "
        "(`engine.block_bytes`).",
        reason="For variants that must always answer at once; all others are loaded and unloaded by use.",
    )
    stall_seconds: float = setting(
        60.0,
        "How long requests may wait without a finished pass before the health service reports NOT_SERVING.",
        unit="seconds",
        reason="Far longer than a full pass on a slow CPU; an engine that needs longer hangs.",
        gt=0,
    )
    health_seconds: float = setting(
        1.0,
        "How often the engine's progress is checked.",
        unit="seconds",
        reason="Small against `stall_seconds`, and costs nothing.",
        gt=0,
    )
    metrics_listen: str = setting(
        "127.0.0.1:7451",
        METRICS_LISTEN_MEANING,
        reason="Only this machine reaches it. If the default port is taken, a free one is used.",
    )
    router: RouterConfig = Field(default_factory=RouterConfig, description="Limits on requests.")
    controller: ControllerConfig = Field(
        default_factory=ControllerConfig, description="Registering over the network."
    )
    engine: EngineConfig = Field(default_factory=EngineConfig, description="Memory, batching, device.")
