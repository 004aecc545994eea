"""The chains in memory, or runs of chains: which there are, who may go, and the segments they are cut into.

All of it belongs to the engine's thread; only `is_loaded`, `get` and the values that `reports` and
`num_bytes` hold are read from elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import replace
from operator import attrgetter

from blockserve.common.api.cluster import ChainSpan
from blockserve.common.api.engine import ChainReport
from blockserve.common.errors import MemoryBudgetError
from blockserve.worker.blocks.chain import LoadedChain, PreparedChain
from blockserve.worker.blocks.eviction import choose_victims
from blockserve.worker.blocks.manager import BlockManager
from blockserve.worker.blocks.segments import SegmentMap, compute_segments
from blockzoo.manifest import ChainId

_LOG = logging.getLogger(__name__)

RETRY_AFTER_S = 30.0
"""When to ask again for memory that requests hold: about as long as an answer takes."""


class LoadedChains:
    """The loaded chains, over the blocks that they share.

    Attributes:
        num_bytes: bytes of all blocks in memory.
        num_loads, num_unloads: how often a chain came and went.
        num_evictions: how often one went to make room for another.
    """

    def __init__(self, blocks: BlockManager, budget: int, use_segments: Callable[[SegmentMap], None]) -> None:
        """Begin without a chain.

        Args:
            blocks: holds the blocks.
            budget: bytes they may take together; 0 is no bound.
            use_segments: is told the segments whenever they change.
        """
        self._blocks = blocks
        self._budget = budget
        self._use_segments = use_segments
        self._chains: dict[ChainSpan, LoadedChain] = {}
        self._whole: dict[ChainId, LoadedChain] = {}
        self._reports: dict[ChainSpan, ChainReport] = {}
        self._uses = 0
        self.num_bytes = 0
        self.num_loads = self.num_unloads = self.num_evictions = 0

    def get(self, span: ChainSpan) -> LoadedChain | None:
        """A chain that is in memory, draining ones included."""
        return self._chains.get(span)

    def whole(self, chain: ChainId) -> LoadedChain | None:
        """A chain of which every position is in memory."""
        return self._whole.get(chain)

    def is_loaded(self, span: ChainSpan) -> bool:
        """Whether requests on the chain can start."""
        loaded = self._chains.get(span)
        return loaded is not None and not loaded.draining

    def make_room(
        self, coming: ChainSpan, estimate: Mapping[Hashable, int], arriving: Collection[ChainSpan]
    ) -> None:
        """Unload idle chains until one more fits into the budget.

        Args:
            coming: the chain to come.
            estimate: bytes of each of its blocks and adapters.
            arriving: chains that requests on their way to the engine will use.

        Raises:
            MemoryBudgetError: it does not fit beside what is pinned or in use.
        """
        others = [chain for name, chain in self._chains.items() if name != coming]
        idle = [
            chain
            for chain in sorted(others, key=attrgetter("last_used"))
            if not (chain.pinned or chain.num_requests or chain.span in arriving)
        ]
        staying = [self._blocks.sizes(chain) for chain in others if chain not in idle]
        victims = choose_victims(
            [self._blocks.actual_sizes(estimate), *staying],
            [(chain.span, self._blocks.sizes(chain)) for chain in idle],
            self._budget,
        )
        if victims is None:
            alone = sum(estimate.values()) > self._budget
            way_out = (
                "Raise block_bytes." if alone else "Try again later, unpin a variant, or raise block_bytes."
            )
            raise MemoryBudgetError(
                f"the variant's {sum(estimate.values())} bytes of blocks do not fit beside those of "
                f"{len(staying)} chains that are pinned or in use; the budget is {self._budget}",
                hint=way_out,
                retry_after=0.0 if alone else RETRY_AFTER_S,
                budget=self._budget,
            )
        for name in victims:
            _LOG.info("chain unloaded to make room chain=%s for=%s", name.chain[:12], coming.chain[:12])
            self._unload(self._chains[name])
        self.num_evictions += len(victims)

    def attach(self, prepared: PreparedChain) -> LoadedChain | None:
        """Take a prepared chain into use; None when a block it counts on was unloaded meanwhile."""
        loaded = self._chains.get(prepared.span)
        if loaded is None:
            if not self._blocks.can_attach(prepared):
                return None
            loaded = self._chains[prepared.span] = self._blocks.attach(prepared)
            if loaded.is_whole:
                self._whole[loaded.id] = loaded
            self._note_change()
        loaded.draining = False
        self.touch(loaded)
        return loaded

    def pin(self, span: ChainSpan, pinned: bool) -> None:
        """Say whether a chain must stay when others need room."""
        loaded = self._chains.get(span)
        if loaded is not None:
            loaded.pinned = pinned

    def drain(self, span: ChainSpan) -> None:
        """Unload a chain as soon as no request uses it."""
        loaded = self._chains.get(span)
        if loaded is not None:
            loaded.draining = True
            loaded.pinned = False
            self._drop_if_drained(loaded)

    def acquire(self, chain: LoadedChain) -> bool:
        """Count one more request on a chain; False when it was unloaded meanwhile."""
        if self._chains.get(chain.span) is not chain:
            return False
        chain.num_requests += 1
        self.touch(chain)
        return True

    def release(self, chain: LoadedChain) -> None:
        """Count one request less; a draining chain goes with its last."""
        chain.num_requests -= 1
        self.touch(chain)
        self._drop_if_drained(chain)

    def touch(self, chain: LoadedChain) -> None:
        """Note a use of a chain."""
        self._uses += 1
        chain.last_used = self._uses

    def reports(self) -> tuple[ChainReport, ...]:
        """What is said about each chain; sizes as of the last change, the rest as of now."""
        return tuple(
            replace(one, running_requests=chain.num_requests, pinned=chain.pinned)
            for span, one in list(self._reports.items())
            if (chain := self._chains.get(span)) is not None
        )

    def _drop_if_drained(self, chain: LoadedChain) -> None:
        if chain.draining and chain.num_requests == 0 and self._chains.get(chain.span) is chain:
            self._unload(chain)

    def _unload(self, chain: LoadedChain) -> None:
        del self._chains[chain.span]
        if chain.is_whole:
            del self._whole[chain.id]
        self._blocks.detach(chain)
        self._note_change()

    def _note_change(self) -> None:
        bases = {span: [link.base for link in chain.links()] for span, chain in self._chains.items()}
        self._use_segments(compute_segments(bases))
        known = self._reports.keys()
        self.num_loads += len(bases.keys() - known)
        self.num_unloads += len(known - bases.keys())
        self._reports = {
            span: ChainReport(span.chain, 0, *self._blocks.chain_bytes(chain), run=span.run)
            for span, chain in self._chains.items()
        }
        self.num_bytes = self._blocks.num_bytes
