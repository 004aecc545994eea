"""Cached prefixes through the engine: what is computed, for whom, and that answers stay what they are."""

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockserve.common.api.engine import EngineRequest, SamplingParams, TokenEvent
from blockserve.worker.compute.executor import Executor
from blockserve.worker.engine.debug import prompt_logits
from blockserve.worker.engine.engine import BlockEngine
from blockserve.worker.limits import EngineConfig
from blockserve.worker.requests.running import Chunk
from blockzoo.manifest import ChainId
from blockzoo.zoo import Zoo
from support.models import SPECS, edit_checkpoint, make_checkpoint
from support.tiny import SMALL, TinyZoo

GREEDY = SamplingParams(temperature=0.0)
PROMPT = tuple(itertools.islice(itertools.cycle(range(3, 200, 7)), 100))
UNCACHED = replace(SMALL, prefix_sharing="off")
Case = tuple[ChainId, tuple[int, ...]]
_ids = itertools.count()


class Rig:
    """A running engine with every chain of a zoo loaded, called synchronously."""

    def __init__(self, zoo: Zoo, config: EngineConfig) -> None:
        self.engine = BlockEngine(zoo, config)
        self.engine.start()

    def ask(self, *args: Any, **more: Any) -> list[TokenEvent]:
        return asyncio.run(self._answer(*args, **more))

    def tokens(self, *args: Any, **more: Any) -> list[int]:
        return [event.token_id for event in self.ask(*args, **more)]

    def tokens_together(self, cases: Sequence[Case], *args: Any, **more: Any) -> list[list[int]]:
        """Of requests that run at the same time."""

        async def work() -> list[list[TokenEvent]]:
            return await asyncio.gather(*(self._answer(*case, *args, **more) for case in cases))

        return [[event.token_id for event in events] for events in asyncio.run(work())]

    async def _answer(
        self, chain: ChainId, prompt: Sequence[int], max_tokens: int = 8, **more: Any
    ) -> list[TokenEvent]:
        await self.engine.load(chain)
        more.setdefault("sampling", GREEDY)
        request = EngineRequest(f"r{next(_ids)}", chain, tuple(prompt), max_tokens=max_tokens, **more)
        return [event async for batch in self.engine.generate(request) for event in batch]


@contextmanager
def rig(zoo: Zoo, config: EngineConfig = SMALL) -> Iterator[Rig]:
    made = Rig(zoo, config)
    try:
        yield made
    finally:
        made.engine.stop()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forward call, as the executor is given them."""
    counts: list[int] = []
    whole = Executor.run

    def counting(self: Executor, chunks: Sequence[Chunk], before: Any = None) -> Any:
        counts.append(sum(chunk.num_tokens for chunk in chunks))
        return whole(self, chunks, before)

    monkeypatch.setattr(Executor, "run", counting)
    return counts


def test_a_second_request_computes_only_the_rest(tiny: TinyZoo, computed: list[int]) -> None:
    """512 tokens in pages of 32, and the tokens that go through the forward call are counted."""
    config = replace(SMALL, kv_page_tokens=32, kv_cache_bytes=32 << 20, max_tokens_per_pass=128)
    context = tuple(token % 480 + 3 for token in range(0, 512 * 11, 11))[:480]
    chain = tiny.chains["base"]
    with rig(tiny.zoo, config) as server:
        server.ask(chain, context, 1)
        assert sum(computed) == 480
        computed.clear()
        (event,) = server.ask(chain, (*context, *range(50, 66)), 1)
        assert computed == [16]
        assert event.cached_prompt_tokens == 480
        computed.clear()
        (event,) = server.ask(chain, context, 1)
        assert (computed, event.cached_prompt_tokens) == ([32], 448)  # the last token needs its page
        report = server.engine.report()
        assert (report.prefix_queried_tokens, report.prefix_hit_tokens) == (480 + 496 + 480, 480 + 448)
        assert report.kv_pages_used == 0
        assert report.kv_pages_cached == 4 * 15


def test_answers_do_not_depend_on_the_cache(tiny: TinyZoo) -> None:
    prompts = [PROMPT[:length] for length in (1, 7, 8, 9, 16, 17, 64, 65, 100)]
    cases = [(chain, prompt) for chain in tiny.chains.values() for prompt in prompts]
    sampled = SamplingParams(temperature=0.9, top_p=0.95, seed=5)
    for params in (GREEDY, sampled):
        with rig(tiny.zoo, UNCACHED) as server:
            expected = server.tokens_together(cases, 10, sampling=params)
            assert server.engine.report().prefix_queried_tokens == 0
        with rig(tiny.zoo) as server:
            assert [server.tokens(*case, 10, sampling=params) for case in cases] == expected
            assert server.tokens_together(cases, 10, sampling=params) == expected
            assert server.engine.report().prefix_hit_tokens > 1000


def test_an_answer_is_cached_for_the_next_turn(tiny: TinyZoo, computed: list[int]) -> None:
    chain = tiny.chains["all"]
    with rig(tiny.zoo) as server:
        answer = server.tokens(chain, PROMPT[:20], 30)
        computed.clear()
        (event,) = server.ask(chain, (*PROMPT[:20], *answer, 9, 9), 1)
        # 49 tokens were computed (the last sampled one never is): six full pages of eight.
        assert (event.cached_prompt_tokens, computed) == (48, [4])


def test_a_name_registered_again_never_meets_stale_keys_and_values(tmp_path: Path) -> None:
    """vllm#42125: the same name, other weights, the prefix still cached under the name."""
    old = make_checkpoint(SPECS["llama-gqa"], tmp_path / "old")
    new = edit_checkpoint(
        old, tmp_path / "new", tensors=lambda name, t: t * 1.1 if "layers.1.self_attn.k_proj" in name else t
    )
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(old, name="bot")
    before = zoo.resolve("bot").chain
    for sharing in ("variant", "identical_chain"):
        with rig(zoo, replace(SMALL, prefix_sharing=sharing)) as server:
            first = server.tokens(before, PROMPT, 24)
            zoo.register(new, name="bot")
            after = zoo.resolve("bot").chain
            assert after != before
            (event, *rest) = server.ask(after, PROMPT, 24)
            assert event.cached_prompt_tokens == 0
            second = [event.token_id, *(one.token_id for one in rest)]
            assert server.ask(before, PROMPT, 24)[0].cached_prompt_tokens == 96
        with rig(zoo, UNCACHED) as server:
            assert server.tokens(after, PROMPT, 24) == second
            assert first != second


def test_an_adapter_and_its_base_share_no_computation(tiny: TinyZoo) -> None:
    """Also where chains may share: the layers part at the first adapted one."""
    with rig(tiny.zoo, replace(SMALL, prefix_sharing="identical_chain")) as server:
        for name in ("base", "all", "other", "top"):
            assert server.ask(tiny.chains[name], PROMPT, 1)[0].cached_prompt_tokens == 0
        # The top variant keeps one layer of four of its own; the others' pages are the base's.
        assert server.engine.report().kv_pages_cached == 12 * (4 + 4 + 4 + 1)


def test_chains_that_part_at_the_head_share_when_allowed(tmp_path: Path, computed: list[int]) -> None:
    base = make_checkpoint(SPECS["llama-gqa"], tmp_path / "base")
    other = edit_checkpoint(
        base,
        tmp_path / "other",
        tensors=lambda name, tensor: tensor * 1.3 if name.split(".")[1] == "norm" else tensor,
    )
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(base, name="base")
    zoo.register(other, name="other")
    chains = [zoo.resolve(name).chain for name in ("base", "other")]
    assert chains[0] != chains[1]
    with rig(zoo, UNCACHED) as server:
        expected = server.tokens(chains[1], PROMPT, 12)
    for sharing, cached in (("variant", 0), ("identical_chain", 96)):
        with rig(zoo, replace(SMALL, prefix_sharing=sharing)) as server:
            server.ask(chains[0], PROMPT, 1)
            events = server.ask(chains[1], PROMPT, 12)
            assert events[0].cached_prompt_tokens == cached
            assert [event.token_id for event in events] == expected


def test_salts_separate_tenants(tiny: TinyZoo, computed: list[int]) -> None:
    chain = tiny.chains["base"]
    with rig(tiny.zoo) as server:
        hits = [
            server.ask(chain, PROMPT, 1, cache_salt=salt)[0].cached_prompt_tokens
            for salt in ("", "a", "b", "a", "", "ab")
        ]
        assert hits == [0, 0, 0, 96, 96, 0]


def test_logits_of_the_prompt_are_always_computed(tiny: TinyZoo, computed: list[int]) -> None:
    chain = tiny.chains["base"]
    with rig(tiny.zoo) as server:
        whole = server.ask(chain, PROMPT, 1, prompt_logprobs=True)
        again = server.ask(chain, PROMPT, 1, prompt_logprobs=True)
        assert whole[0].prompt_logprobs == again[0].prompt_logprobs
        assert whole[0].prompt_logprobs is not None
        assert len(whole[0].prompt_logprobs) == len(PROMPT) - 1
        server.ask(chain, PROMPT, 1)
        computed.clear()
        assert prompt_logits(server.engine, chain, PROMPT).shape[0] == len(PROMPT)
        assert sum(computed) == len(PROMPT)


def test_prefixes_survive_unloading(tiny: TinyZoo) -> None:
    chain = tiny.chains["all"]
    with rig(tiny.zoo) as server:
        before = server.tokens(chain, PROMPT)
        asyncio.run(server.engine.unload(chain))
        assert not server.engine.is_loaded(chain)
        events = server.ask(chain, PROMPT)
        assert events[0].cached_prompt_tokens == 96
        assert [event.token_id for event in events] == before


def test_a_full_pool_forgets_the_least_recently_used(tiny: TinyZoo) -> None:
    """16 pages of each of four layers hold one prompt of 100 tokens and its growth, never two."""
    chain = tiny.chains["base"]
    page = 8 * 4 * 2 * 3 * 14 * 4
    with rig(tiny.zoo, replace(SMALL, kv_cache_bytes=16 * page)) as server:
        other = tuple(reversed(PROMPT))
        expected = [server.tokens(chain, prompt) for prompt in (PROMPT, other)]
        assert [server.tokens(chain, prompt) for prompt in (PROMPT, other)] == expected
        report = server.engine.report()
        assert report.kv_pages_total == 64
        assert report.kv_pages_used == 0
        assert 0 < report.kv_pages_cached <= 64
        assert server.ask(chain, other, 1)[0].cached_prompt_tokens == 96
