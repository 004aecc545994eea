"""Pages for requests: what the scheduler asks about memory, answered by pools and the prefix cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blockserve.worker.kv.pool import KvPool, KvShape, KvTable
from blockserve.worker.kv.prefix import CachedBlock, extend_tokens_digests
from blockserve.worker.requests.running import RunningRequest


class KvMemory:
    """Gives requests pages and takes them back; see `blockserve.worker.engine.scheduler.KvAllocator`.

    Attributes:
        num_queried: prompt tokens of requests that looked into the prefix cache.
        num_hits: those found there.
    """

    def __init__(self, pools: Mapping[KvShape, KvPool], reserve_tokens: int) -> None:
        """Use these pools; `reserve_tokens` as `EngineConfig.kv_reserve_tokens`."""
        self._pools = pools
        self._reserve_tokens = reserve_tokens
        self.num_queried = 0
        self.num_hits = 0

    def pool(self, running: RunningRequest) -> KvPool:
        """Where a request's pages are."""
        return self._pools[running.chain.lane.kv_shape]

    def compete(self, one: RunningRequest, other: RunningRequest) -> bool:
        """Whether pages of the one could be given to the other."""
        return self.pool(one) is self.pool(other)

    def try_admit(self, running: RunningRequest, rivals: Sequence[RunningRequest]) -> bool:
        """Give a waiting request pages for the tokens it has, those of cached prefixes first.

        Args:
            running: the request.
            rivals: who runs in the same pool; a page of growth at every layer is left for each.
        """
        running.settle()
        pool, chain = self.pool(running), running.chain
        cached: list[CachedBlock] = []
        if self._uses_cache(running):
            # The last token is always computed: without it there are no logits to sample from.
            usable = running.num_tokens - 1
            if running.cache_limit is not None:
                usable = min(usable, running.cache_limit)
            usable //= pool.page_tokens
            self._digest(running, usable)
            cached = pool.prefixes.match(chain.layer_digests, running.token_digests[:usable])
        running.kv = pool.try_allocate(
            chain.num_layers,
            running.num_tokens,
            reserve_tokens=self._growth(running),
            cached=cached,
            headroom=sum(rival.chain.num_layers for rival in rivals),
        )
        if running.kv is None:
            return False
        running.num_computed = len(cached) * pool.page_tokens
        running.num_offered = len(cached)
        if not running.was_admitted and self._uses_cache(running):
            running.num_cached = running.num_computed
            self.num_queried += running.num_tokens
            self.num_hits += running.num_cached
        running.was_admitted = True
        return True

    def try_grow(self, running: RunningRequest) -> bool:
        """Have a running request hold pages for all tokens it has; False when they cannot be had."""
        table = _table(running)
        return self.pool(running).try_grow(table, running.num_tokens, reserve_tokens=self._growth(running))

    def release(self, running: RunningRequest) -> None:
        """Take a request's pages away; what it computed is forgotten, its tokens are not."""
        if running.kv is not None:
            self.pool(running).free(running.kv)
            running.forget_computed()

    def note_computed(self, running: RunningRequest) -> None:
        """Offer the pages that a pass has filled to the prefix cache."""
        if running.kv is None or not self._uses_cache(running):
            return
        pool, chain = self.pool(running), running.chain
        full = running.num_computed // pool.page_tokens
        self._digest(running, full)
        for place in range(running.num_offered, full):
            block = pool.prefixes.insert(
                chain.layer_digests, running.token_digests[place], running.kv.index[:, place]
            )
            if block is not None:
                running.kv.cached.append(block)
        running.num_offered = full

    def _uses_cache(self, running: RunningRequest) -> bool:
        """Logits of the whole prompt can only be told by computing it."""
        asks_for_all = running.request.prompt_logprobs or running.probe is not None
        return bool(running.chain.layer_digests) and not asks_for_all

    def _digest(self, running: RunningRequest, num_pages: int) -> None:
        """Have `token_digests` of the first pages."""
        known, size = len(running.token_digests), self.pool(running).page_tokens
        if known < num_pages:
            tokens = running.tokens(known * size, num_pages * size)
            angles = running.chain.angles_key(running.together)
            extend_tokens_digests(running.token_digests, running.request.cache_salt, tokens, size, angles)

    def _growth(self, running: RunningRequest) -> int:
        return min(self._reserve_tokens, max(0, running.max_kv_tokens - running.num_tokens))


def _table(running: RunningRequest) -> KvTable:
    """The pages of a running request."""
    assert running.kv is not None
    return running.kv
