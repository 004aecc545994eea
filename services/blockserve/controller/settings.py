"""Settings of `blockzoo controller`. docs/configuration.md is made from these models."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from blockserve.common.process.settings import ClusterSettings
from blockserve.common.settings import setting
from blockserve.controller.push.limits import ControllerConfig


class ControllerSettings(ClusterSettings):
    """Settings of one controller."""

    listen: str = setting(
        "127.0.0.1:7452",
        "Where to listen: `host:port` (port 0 picks a free one) or `unix:/path/to/socket`.",
        reason="The router uses 7450 and metrics use 7451.",
    )
    advertise: str = setting(
        "",
        "The address at which routers reach this controller. Empty: the address where it listens.",
        reason="In a container the two differ.",
    )
    create_zoo: bool = setting(
        False,
        "Create an empty zoo if there is none.",
        reason="Without it, a wrong path is an error. With it, a new cluster can be filled from other "
        "machines.",
    )
    look_seconds: float = setting(
        1.0,
        "How often demand is read when nothing else changes.",
        unit="seconds",
        reason="Below a third of the leader's lease, which is renewed with it.",
        gt=0,
    )
    replicas: int = setting(
        1,
        "Minimum number of workers that hold each variant, as long as there is room.",
        reason="With 2, requests of a lost worker continue at once; shared blocks make the second copy "
        "cheap.",
        ge=1,
    )
    controller: ControllerConfig = Field(
        default_factory=ControllerConfig, description="Registering over the network."
    )

    @model_validator(mode="after")
    def _leads_on(self) -> Self:
        if 2 * self.look_seconds > self.state.lease_seconds:
            raise ValueError("state.lease_seconds has to be at least twice look_seconds, which renews it")
        return self
