"""Settings of `blockzoo router`. docs/configuration.md is made from these models."""

from __future__ import annotations

from pydantic import Field

from blockserve.common.process.settings import ClusterSettings
from blockserve.common.settings import setting
from blockserve.router.cluster.failover import FailoverConfig
from blockserve.router.cluster.kv_plan import KvCosts
from blockserve.router.limits import RouterConfig
from blockserve.router.paths.adaptive import AdaptiveConfig


class RouterSettings(ClusterSettings):
    """Settings of one router."""

    own_cores: bool = setting(
        False,
        "Nothing else computes on this router's cores: its threads take turns instead of interrupting each "
        "other (SCHED_BATCH; Linux).",
        reason="A core then carries more requests; beside workers, tokens would wait for their turn.",
    )
    router: RouterConfig = Field(default_factory=RouterConfig, description="Limits on requests.")
    adaptive: AdaptiveConfig = Field(
        default_factory=AdaptiveConfig, description="Approved equivalents instead of busy or absent blocks."
    )
    kv: KvCosts = Field(default_factory=KvCosts, description="Keys and values that follow a request.")
    failover: FailoverConfig = Field(
        default_factory=FailoverConfig, description="Requests that lose a worker."
    )
