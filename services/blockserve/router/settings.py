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
        "Set this if no other process computes on this router's cores: its threads then take turns instead "
        "of interrupting each other (SCHED_BATCH; Linux).",
        reason="Each core carries more requests. On cores shared with workers, tokens would be delayed.",
    )
    zoo_calls: bool = setting(
        True,
        "Pass calls about the zoo (register, ls, rm, gc, ...) on to the controller that leads.",
        reason="One address is enough for every command. Whoever may call this router may then change the "
        "zoo, as with `serve`.",
    )
    router: RouterConfig = Field(default_factory=RouterConfig, description="Limits on requests.")
    adaptive: AdaptiveConfig = Field(
        default_factory=AdaptiveConfig, description="Approved equivalents in place of busy or missing blocks."
    )
    kv: KvCosts = Field(default_factory=KvCosts, description="Moving keys and values with a request.")
    failover: FailoverConfig = Field(
        default_factory=FailoverConfig, description="Requests whose worker is lost."
    )
