"""Settings of `blockzoo router`. docs/configuration.md is made from these models."""

from __future__ import annotations

from pydantic import Field

from blockserve.common.process.settings import ClusterSettings
from blockserve.common.rpc.address import is_local
from blockserve.common.settings import setting
from blockserve.router.cluster.failover import FailoverConfig
from blockserve.router.cluster.kv_plan import KvCosts
from blockserve.router.limits import RouterConfig, UnregisteredSettings
from blockserve.router.paths.adaptive import AdaptiveConfig


class RouterSettings(ClusterSettings, UnregisteredSettings):
    """Settings of one router."""

    own_cores: bool = setting(
        False,
        "Set this if no other process computes on this router's cores: its threads then take turns instead "
        "of interrupting each other (SCHED_BATCH; Linux).",
        reason="Each core carries more requests. On cores shared with workers, tokens would be delayed.",
    )
    zoo_calls: bool | None = setting(
        None,
        "Pass calls about the zoo (register, export, ls, rm, gc, ...) on to the controller that leads. "
        "Unset: on addresses of this machine, and where callers must send a token (`blockzoo up` sets it).",
        reason="One address is enough for every command that a server takes, but whoever may call this "
        "router may then change the zoo and read its weights: the controller sees the router's token, not "
        "the caller's certificate.",
    )
    router: RouterConfig = Field(default_factory=RouterConfig, description="Limits on requests.")
    adaptive: AdaptiveConfig = Field(
        default_factory=AdaptiveConfig, description="Approved equivalents in place of busy or missing blocks."
    )
    kv: KvCosts = Field(default_factory=KvCosts, description="Moving keys and values with a request.")
    failover: FailoverConfig = Field(
        default_factory=FailoverConfig, description="Requests whose worker is lost."
    )

    @property
    def passes_zoo_calls(self) -> bool:
        """Whether calls about the zoo are passed on."""
        if self.zoo_calls is not None:
            return self.zoo_calls
        return is_local(self.listen) or self.token is not None or self.token_file is not None
