"""Several engines in one process that execute chains together, joined by a wire that tests can disturb."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from blockserve.common.api.cluster import ChainSpan, PathStep, Run, WorkerId
from blockserve.common.errors import ServerStoppingError
from blockserve.worker.engine.engine import BlockEngine
from blockserve.worker.limits import EngineConfig
from blockserve.worker.peers.messages import SpanMsg
from blockzoo.manifest import ChainId
from support.tiny import SMALL, TinyZoo

Filter = Callable[[WorkerId, SpanMsg], bool]
"""Receiver and message -> whether it is delivered."""


@dataclass
class Wire:
    """Delivers to engines of this process, in the sender's thread; see `worker.exchange.Outlet`."""

    engines: dict[WorkerId, BlockEngine] = field(default_factory=dict)
    sent: list[tuple[WorkerId, SpanMsg]] = field(default_factory=list)
    deliver: Filter = lambda _to, _message: True
    full: set[WorkerId] = field(default_factory=set)
    reports: list[int] = field(default_factory=list)

    def send(self, step: PathStep, messages: Sequence[SpanMsg]) -> None:
        """Deliver what the filter lets through."""
        self.sent.extend((step.worker, message) for message in messages)
        kept = [message for message in messages if self.deliver(step.worker, message)]
        try:
            if kept:
                self.engines[step.worker].receive(WorkerId("?"), kept)
        except ServerStoppingError:
            return

    def has_room(self, step: PathStep) -> bool:
        """Whether nobody said that the worker is slow."""
        return step.worker not in self.full

    def taken(self, sender: WorkerId, num_bytes: int) -> None:
        """Note what was computed on or dropped."""
        del sender
        self.reports.append(num_bytes)

    def count(self, kind: type[SpanMsg]) -> int:
        """Messages of a kind so far."""
        return sum(isinstance(message, kind) for _, message in self.sent)


class SpanCluster:
    """Engines that hold parts of chains."""

    def __init__(self, tiny: TinyZoo, names: Sequence[str], configs: Sequence[EngineConfig]) -> None:
        self.wire = Wire()
        self.tiny = tiny
        for name, config in zip(names, configs, strict=True):
            self.wire.engines[WorkerId(name)] = BlockEngine(tiny.zoo, config, outlet=self.wire)

    @property
    def engines(self) -> dict[WorkerId, BlockEngine]:
        return self.wire.engines

    def engine(self, name: str) -> BlockEngine:
        return self.engines[WorkerId(name)]

    def path(self, chain: ChainId, **cuts: int) -> tuple[PathStep, ...]:
        """A path over workers in order; each number is where the worker's run ends, 0 means at the end."""
        length = len(self.tiny.zoo.chain(chain).links)
        steps, first = [], 0
        for name, end in cuts.items():
            steps.append(PathStep(WorkerId(name), name, Run(first, end or length)))
            first = end
        return tuple(steps)

    async def load(self, chain: ChainId, path: Sequence[PathStep]) -> None:
        """Load what each worker of a path executes."""
        for step in path:
            await self.engines[step.worker].load_span(ChainSpan(chain, step.run))

    def is_clean(self) -> bool:
        """Whether no engine holds pages or requests."""
        reports = [engine.report() for engine in self.engines.values()]
        return not any(one.kv_pages_used + one.running_requests + one.waiting_requests for one in reports)


@contextmanager
def span_cluster(
    tiny: TinyZoo, names: str, config: EngineConfig = SMALL, **configs: EngineConfig
) -> Iterator[SpanCluster]:
    """Engines named in `names`, started; `configs` for those that differ."""
    cluster = SpanCluster(tiny, names.split(), [configs.get(name, config) for name in names.split()])
    for engine in cluster.engines.values():
        engine.start()
    try:
        yield cluster
    finally:
        for engine in cluster.engines.values():
            engine.stop()
