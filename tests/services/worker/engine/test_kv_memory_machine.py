"""Scheduler, pages and prefix cache together, in any order of events: a Hypothesis state machine.

What would be keys and values is a note beside each page of what was written there, so a
page read by the wrong request, or written while somebody else counts on it, is seen.
"""

from collections import Counter
from typing import cast

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from blockserve.common.api.cluster import Run
from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.worker.blocks.chain import Lane, LoadedChain
from blockserve.worker.engine.kv_memory import KvMemory
from blockserve.worker.engine.scheduler import Scheduler
from blockserve.worker.kv.pool import KvPool, KvShape
from blockserve.worker.kv.prefix import PrefixSharing, layer_digests
from blockserve.worker.requests.running import RunningRequest
from blockzoo.compute.build import ExecutableBlock
from blockzoo.manifest import BlockId, ChainId, ChainManifest, Link

PAGE_TOKENS = 2
NUM_PAGES = 30
SHAPE = KvShape(1, 1, torch.float32)
CHAINS = ("e a b h", "e a c h", "e a b h2", "e a b c h")
"""Two that part at the second layer, one that parts from the first at the head, and a longer one."""
Content = tuple[bytes, tuple[int, ...]]
"""What decides the keys and values in a page: the links up to its layer, salt and tokens up to its end."""


def _chain(links: str, sharing: PrefixSharing) -> LoadedChain:
    bases = links.split()
    manifest = ChainManifest("llama", tuple(Link(BlockId(base)) for base in bases), 64, 10)
    name = ChainId(links)
    blocks = cast(tuple[ExecutableBlock, ...], tuple(bases))
    digests = layer_digests(name, manifest, sharing)
    return LoadedChain(name, manifest, Run(0, len(bases)), blocks, torch.float32, Lane(1, SHAPE), digests)


class _MemoryMachine(RuleBasedStateMachine):
    sharing: PrefixSharing = "variant"

    def __init__(self) -> None:
        super().__init__()
        size = NUM_PAGES * PAGE_TOKENS * SHAPE.token_bytes
        self.pool = KvPool(SHAPE, size, PAGE_TOKENS, torch.device("cpu"))
        self.memory = KvMemory({SHAPE: self.pool}, reserve_tokens=3)
        self.scheduler = Scheduler(self.memory, max_running=4, max_tokens=7)
        self.chains = [_chain(links, self.sharing) for links in CHAINS]
        self.written: dict[tuple[int, int], Content] = {}  # (page, offset in it) -> content
        self.order = 0

    @property
    def requests(self) -> list[RunningRequest]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    @rule(
        chain=st.integers(0, len(CHAINS) - 1),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        max_tokens=st.integers(1, 6),
        salt=st.sampled_from(["", "", "s"]),
        priority=st.integers(0, 1),
        whole=st.sampled_from([False, False, False, True]),
    )
    def arrive(
        self, chain: int, prompt: list[int], max_tokens: int, salt: str, priority: int, whole: bool
    ) -> None:
        request = EngineRequest(
            str(self.order),
            self.chains[chain].id,
            tuple(prompt),
            SamplingParams(),
            max_tokens,
            prompt_logprobs=whole,
            priority=priority,
            cache_salt=salt,
        )
        running = RunningRequest(request, self.chains[chain], self.order)
        self.order += 1
        if self.pool.pages_needed(running.chain.num_layers, running.max_kv_tokens) <= NUM_PAGES:
            self.scheduler.add(running)

    @rule()
    def run_pass(self) -> None:
        first = self.scheduler.running[0] if self.scheduler.running else None
        chunks = self.scheduler.next_chunks()
        assert bool(chunks) == self.scheduler.has_work
        assert first is None or first in self.scheduler.running
        for chunk in chunks:
            self._write(chunk.running, chunk.start, chunk.end)
            samples = chunk.samples
            chunk.running.num_computed = chunk.end
            if samples:
                self._attend(chunk.running)
                chunk.running.output.append(len(chunk.running.output) % 2)
            self.memory.note_computed(chunk.running)
        for chunk in chunks:
            if len(chunk.running.output) == chunk.running.request.max_tokens:
                self._leave(chunk.running)

    @rule(which=st.integers(0, 20))
    def cancel(self, which: int) -> None:
        if self.requests:
            self._leave(self.requests[which % len(self.requests)])

    def _leave(self, running: RunningRequest) -> None:
        self.scheduler.remove(running)
        self.memory.release(running)

    def _content(self, running: RunningRequest, layer: int, position: int) -> Content:
        links = running.chain.manifest.links[: layer + 2]
        salt = running.request.cache_salt
        # "variant" keeps apart even what would be the same.
        chain = running.chain.id if self.sharing == "variant" else ""
        return f"{chain}/{salt}/{[link.base for link in links]}".encode(), tuple(
            running.tokens(0, position + 1)
        )

    def _write(self, running: RunningRequest, start: int, end: int) -> None:
        assert running.kv is not None
        for layer in range(running.chain.num_layers):
            for position in range(start, end):
                page = int(running.kv.index[layer, position // PAGE_TOKENS])
                assert self.pool.allocator.holders[page] == 1, "written while somebody else holds it"
                self.written[page, position % PAGE_TOKENS] = self._content(running, layer, position)

    def _attend(self, running: RunningRequest) -> None:
        """All that attention reads is what the request itself would have written."""
        assert running.kv is not None
        for layer in range(running.chain.num_layers):
            for position in range(running.num_computed):
                page = int(running.kv.index[layer, position // PAGE_TOKENS])
                found = self.written[page, position % PAGE_TOKENS]
                assert found == self._content(running, layer, position)

    @invariant()
    def every_page_is_counted(self) -> None:
        allocator, cache = self.pool.allocator, self.pool.prefixes
        holders: Counter[int] = Counter()
        for running in self.requests:
            if running.kv is not None:
                holders.update(running.kv.index.reshape(-1).tolist())
        for block in cache._blocks.values():
            holders.update(block.pages.tolist())
            users = sum(running.kv is not None and block in running.kv.cached for running in self.requests)
            assert block.num_users == users
            assert (block in cache._idle) == (users == 0)
        assert {page: count for page, count in enumerate(allocator.holders.tolist()) if count} == holders
        assert allocator.num_free == NUM_PAGES - len(holders)
        assert set(cache._pages.values()) == {
            page for b in cache._blocks.values() for page in b.pages.tolist()
        }

    @invariant()
    def waiting_requests_hold_nothing(self) -> None:
        assert all(running.kv is None for running in self.scheduler.waiting)

    def teardown(self) -> None:
        """Whatever happened, everybody who is left ends."""
        for _ in range(400):
            if not self.scheduler.has_work:
                break
            self.run_pass()
        assert not self.scheduler.has_work
        self.every_page_is_counted()
        assert self.pool.num_used == 0
        self.pool.prefixes.evict(NUM_PAGES)
        assert self.pool.allocator.num_free == NUM_PAGES


class _SharingMachine(_MemoryMachine):
    sharing: PrefixSharing = "identical_chain"


class _NoCacheMachine(_MemoryMachine):
    sharing: PrefixSharing = "off"


_SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestVariant = _MemoryMachine.TestCase
TestVariant.settings = _SETTINGS
TestIdenticalChain = _SharingMachine.TestCase
TestIdenticalChain.settings = _SETTINGS
TestOff = _NoCacheMachine.TestCase
TestOff.settings = _SETTINGS
