"""The real engine behind synchronous calls: a temporary zoo, registered variants, many requests at once."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from blockserve.common.api.engine import EngineReport, EngineRequest, SamplingParams, TokenEvent
from blockserve.common.api.tokens import FinishReason
from blockserve.worker.engine.debug import prompt_logits
from blockserve.worker.engine.engine import BlockEngine
from blockserve.worker.limits import EngineConfig
from blockzoo.manifest import ChainId
from blockzoo.zoo import Zoo
from support.oracle import NUM_PROMPTS, Expected, Prompt, Propose, Report, compare
from support.variants import Variant, VariantFactory

GREEDY = SamplingParams(temperature=0.0)

EXACT_CONFIG = EngineConfig(
    dtype="float32",
    num_threads=1,
    max_running_requests=36,
    max_tokens_per_pass=47,
    kv_cache_bytes=64 << 20,
    kv_page_tokens=7,
)
"""Small odd pages and prompt chunks, so tests cross their borders; one thread suits tiny models."""


@dataclass(frozen=True)
class Ask:
    """One request of a batch."""

    chain: ChainId
    prompt: Prompt
    num_tokens: int
    sampling: SamplingParams = GREEDY


class EngineHarness:
    """An engine over a zoo in a folder. Use as a context manager."""

    def __init__(self, folder: Path, config: EngineConfig = EXACT_CONFIG) -> None:
        self.zoo = Zoo.open(folder, create=not (folder / "zoo.json").exists())
        self.engine = BlockEngine(self.zoo, config)
        self._loop = asyncio.new_event_loop()
        self._ids = itertools.count()
        self._registered: dict[str, ChainId] = {}

    def __enter__(self) -> Self:
        self.engine.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.engine.stop()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def register(self, variant: Variant) -> ChainId:
        """Put a variant (and the base of an adapter) into the zoo once; returns its chain."""
        if variant.name not in self._registered:
            if variant.is_adapter:
                assert variant.base is not None
                self.register(variant.base)
                self.zoo.register(variant.path, name=variant.name, base=variant.base.name)
            else:
                self.zoo.register(variant.path, name=variant.name)
            self._registered[variant.name] = self.zoo.resolve(variant.name).chain
        return self._registered[variant.name]

    def load(self, variant: Variant) -> ChainId:
        """Register a variant and load it into the engine."""
        chain = self.register(variant)
        self.load_chain(chain)
        return chain

    def load_chain(self, chain: ChainId) -> None:
        """Load a chain of the zoo into the engine."""
        self._loop.run_until_complete(self.engine.load(chain))

    def unload(self, chain: ChainId) -> None:
        """Let go of a chain."""
        self._loop.run_until_complete(self.engine.unload(chain))

    def run(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        """Run requests at the same time; the tokens of each."""
        return self._loop.run_until_complete(self._run(asks))

    async def _run(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        events = await asyncio.gather(*(self._collect(ask) for ask in asks))
        return [tuple(event.token_id for event in one) for one in events]

    def events(self, request: EngineRequest) -> list[TokenEvent]:
        """All events of one request."""
        return self._loop.run_until_complete(self._events(request))

    async def _events(self, request: EngineRequest) -> list[TokenEvent]:
        return [event async for batch in self.engine.generate(request) for event in batch]

    async def _collect(self, ask: Ask) -> list[TokenEvent]:
        request = EngineRequest(f"r{next(self._ids)}", ask.chain, ask.prompt, ask.sampling, ask.num_tokens)
        events = await self._events(request)
        assert [event.index for event in events] == list(range(ask.num_tokens))
        assert [event.finish for event in events] == [None] * (ask.num_tokens - 1) + [FinishReason.LENGTH]
        return events

    def greedy(self, chain: ChainId, prompts: Sequence[Prompt], num_tokens: int) -> list[tuple[int, ...]]:
        """Greedy continuations of prompts, all at the same time."""
        return self.run([Ask(chain, prompt, num_tokens) for prompt in prompts])

    def logits(self, chain: ChainId, sequences: Sequence[Prompt]) -> list[Tensor]:
        """Logits at every position of each sequence, [len, vocab] float32 on the CPU."""
        return [
            prompt_logits(self.engine, chain, sequence).to("cpu", torch.float32) for sequence in sequences
        ]

    def compare(self, chain: ChainId, expected: Sequence[Expected]) -> Report:
        """Compare the engine with the oracle on a loaded chain."""
        return self._compare(chain, expected, lambda *asked: self.greedy(chain, *asked))

    def check(
        self, variants: VariantFactory, variant: Variant, count: int = NUM_PROMPTS, **prompts: Any
    ) -> Report:
        """Load a variant and compare the engine with the oracle on random prompts.

        The engine answers first, and the oracle computes answers of its own only where it would have answered
        otherwise (`support.oracle.Oracle.expect`).

        Args:
            variants: made the variant, and keeps the oracle's answers.
            variant: stays loaded.
            count: number of prompts.
            prompts: which ones; see `VariantFactory.cases`.
        """
        chain, given = self.load(variant), dict[Prompt, Prompt]()

        def answer(asked: list[Prompt], num_tokens: int) -> list[Prompt]:
            given.update(zip(asked, self.greedy(chain, asked, num_tokens), strict=True))
            return [given[prompt] for prompt in asked]

        def answer_again(asked: list[Prompt], num_tokens: int) -> list[Prompt]:
            known = all(prompt in given for prompt in asked)
            return [given[prompt] for prompt in asked] if known else answer(asked, num_tokens)

        expected = variants.cases(variant, count, propose=answer, **prompts)
        return self._compare(chain, expected, answer_again)

    def _compare(self, chain: ChainId, expected: Sequence[Expected], tokens: Propose) -> Report:
        return compare(expected, logits=lambda sequences: self.logits(chain, sequences), tokens=tokens)

    def report(self) -> EngineReport:
        """The engine's own report."""
        return self.engine.report()
