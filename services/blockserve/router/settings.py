"""Settings of `blockzoo router`. docs/configuration.md is made from these models."""

from __future__ import annotations

from pydantic import Field

from blockserve.common.process.settings import ClusterSettings
from blockserve.common.settings import Section, setting
from blockserve.router.cluster.kv_plan import KvCosts
from blockserve.router.limits import RouterConfig
from blockserve.router.paths.adaptive import AdaptiveConfig


class FailoverConfig(Section):
    """How a request goes on when a worker is lost."""

    max_failures: int = setting(
        8,
        "Paths that may break under one request before its caller is told.",
        reason="More than a rolling restart of a small cluster breaks; a request that kills workers ends.",
        ge=0,
        le=100,
    )
    backoff_seconds: float = setting(
        0.05,
        "Pause after the second break in a row, doubled for each further one.",
        unit="seconds",
        reason="The first break goes on at once; those that follow may have a common cause that passes.",
        ge=0,
    )
    path_seconds: float = setting(
        30.0,
        "How long a request waits until live workers hold all of its variant.",
        unit="seconds",
        reason="A variant of several GB is read from a disk in that time.",
        ge=0,
    )


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
