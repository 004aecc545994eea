"""Settings of the metrics endpoint, the same for every process that serves."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from blockserve.common.rpc.address import is_host_and_port, is_local
from blockserve.common.rpc.settings import ServerSettings
from blockserve.common.settings import setting

OFF = "off"
"""As `metrics_listen`: no metrics endpoint."""
METRICS_LISTEN_MEANING = (
    f"Where Prometheus reads metrics over HTTP: `host:port` (port 0 picks a free one), or `{OFF}`."
)


class MetricsSettings(ServerSettings):
    """Where a process shows what it counts, and how many names it tells apart."""

    metrics_listen: str = setting(
        OFF,
        METRICS_LISTEN_MEANING,
        reason="A machine may run many processes of a cluster, and each endpoint needs a port of its own.",
    )
    metrics_public: bool = setting(
        False,
        "Allow `metrics_listen` to be an address that other machines can reach; metrics are plain HTTP "
        "without a credential.",
        reason="Metrics show the names of variants and how much each is used.",
    )
    metrics_model_name: str = setting(
        "blockzoo",
        "The label `model_name` of metrics that describe the engine and not one variant.",
        reason="vLLM's metrics all have the label; scalers ignore it for these.",
        min_length=1,
    )
    metrics_max_labels: int = setting(
        1000,
        "Maximum number of variants, segments and peers with series of their own; the others share the "
        "label `other`.",
        reason="Each costs up to a hundred series; a scrape of a thousand takes a core about a second.",
        ge=0,
    )

    @model_validator(mode="after")
    def _check_metrics(self) -> Self:
        if self.metrics_listen == OFF:
            return self
        if not is_host_and_port(self.metrics_listen):
            raise ValueError(f"metrics_listen: {self.metrics_listen!r} is neither host:port nor {OFF}")
        if not (is_local(self.metrics_listen) or self.metrics_public):
            raise ValueError(
                f"{self.metrics_listen} can be reached from other machines: set metrics_public to allow that"
            )
        return self
