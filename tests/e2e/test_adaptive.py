"""Approved equivalents over real processes: under load and where blocks are absent, spliced and whole."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from blockserve.client.aio import AsyncClient
from blockserve.common.api.results import Completion
from blockserve.common.errors import NoPathError
from blockserve.router.cluster.watching import LOOK_SECONDS
from blockzoo.equivalence import EquivalenceRecord, Ledger, approve, revoke
from blockzoo.errors import BlockzooError
from blockzoo.evaluation.evaluate import evaluate
from blockzoo.zoo import Zoo
from support.cluster import PATIENCE, Cluster, cluster
from support.models import CONTEXT_LENGTH, checkpoint_tensors, edit_checkpoint, tune_layers
from support.oracle import Oracle
from support.scrape import scrape_logged
from support.variants import VariantFactory

PROMPT = "Every tenant sends requests"
TEXT = " ".join(f"line {number} of what tenants send" for number in range(60))
WHO = {"by": "test", "reason": "test"}
CROWD = 30
"""Requests that a worker has at a time when it counts as overloaded."""
CROWD_TOKENS = CONTEXT_LENGTH - 64
"""Of each of their answers: more than anybody waits for."""
SETTINGS = {
    "BLOCKZOO_ENGINE_DTYPE": "float32",
    "BLOCKZOO_ENGINE_NUM_THREADS": "1",
    "BLOCKZOO_ENGINE_KV_PAGE_TOKENS": "8",
    "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(64 << 20),
    "BLOCKZOO_ADAPTIVE_MARGIN": "0.05",
    "BLOCKZOO_ADAPTIVE_MIN_SECONDS": "0",
    "BLOCKZOO_ADAPTIVE_REFRESH_SECONDS": "0",
    "BLOCKZOO_FAILOVER_PATH_SECONDS": "0.5",
}


@dataclass(frozen=True)
class Made:
    """A base, a fine-tune of its layers 0 and 2, and that with the base's layer 2, put together by hand."""

    base: Path
    tuned: Path
    spliced: Path

    def greedy(self, path: Path, num_tokens: int) -> tuple[int, ...]:
        """What transformers answers to PROMPT."""
        prompt = tuple(AutoTokenizer.from_pretrained(self.base)(PROMPT)["input_ids"])
        (tokens,) = Oracle(path).greedy([prompt], num_tokens)
        return tokens


@pytest.fixture(scope="module")
def made(factory: VariantFactory, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("variants")
    base = factory.checkpoint("llama-gqa-tied").path
    tuned = tune_layers(base, root / "tuned", [0, 2], amount=0.5)
    theirs = checkpoint_tensors(base)
    spliced = edit_checkpoint(
        tuned,
        root / "spliced",
        tensors=lambda key, value: theirs[key] if key.startswith("model.layers.2.") else value,
    )
    return Made(base, tuned, spliced)


@pytest.fixture
def zoo(made: Made, base_zoo: Zoo) -> Zoo:
    base_zoo.register(made.tuned, name="tuned", base="base")
    return base_zoo


def approved(zoo: Zoo, number: int) -> EquivalenceRecord:
    """The base's layer 0, layer 2 or both in the place of the tuned ones."""
    record = evaluate(zoo, "tuned", "base", TEXT, max_tokens=256)[number]
    approve(Ledger(zoo.store), record.id, max_kl=100.0, **WHO)
    return record


async def ask(client: AsyncClient, num_tokens: int = 24, **more: Any) -> Completion:
    """One answer of the tuned variant."""
    options = {"temperature": 0, "ignore_eos": True, **more}
    return await client.generate("tuned", PROMPT, max_tokens=num_tokens, **options).result()


async def until_answered(client: AsyncClient, **more: Any) -> Completion:
    """One answer, as soon as the router knows who holds the blocks."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with suppress(NoPathError):
                return await ask(client, **more)


async def until_substituted(client: AsyncClient) -> Completion:
    """The first answer of an equivalent; what is new at a worker is seen within a second or two."""
    async with asyncio.timeout(PATIENCE):
        while not (answer := await ask(client, allow_equivalents=True)).info.approximations:
            pass
    return answer


async def until_told_idle(rig: Cluster, name: str) -> None:
    """Wait until a worker's load report, which is sent every second, says that nothing runs there."""
    async with asyncio.timeout(PATIENCE):
        while (view := await rig.worker_view(name)) is None or view.load.running_requests:
            await asyncio.sleep(0.05)
    await asyncio.sleep(2 * LOOK_SECONDS)  # the router has read it


async def substituted(rig: Cluster) -> float:
    """Requests that an equivalent answered, as the router's metrics count them."""
    scraped = await scrape_logged(rig.log("router0"))
    return scraped.by("blockzoo_substituted_requests_total", "model_name").get("tuned", 0.0)


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test in an event loop of its own, with a bound below that of the whole test."""
    asyncio.run(asyncio.wait_for(work, 250))


def test_a_spliced_chain_runs_on_parts_of_two_variants(made: Made, zoo: Zoo, tmp_path: Path) -> None:
    """One worker has the tuned layer 0 and not layer 2, the other the base: neither variant's chain runs."""
    record = approved(zoo, 1)
    assert record.result not in {variant.chain for variant in zoo.variants()}
    expected = made.greedy(made.spliced, 24)
    assert expected != made.greedy(made.tuned, 24)

    async def work() -> None:
        settings = {**SETTINGS, "BLOCKZOO_METRICS_LISTEN": "127.0.0.1:0"}
        async with cluster(zoo, tmp_path, ["a", "b"], **settings) as rig, rig.client() as client:
            await asyncio.gather(rig.load("a", "tuned", 0, 3), rig.load("b", "base"))
            before = [(await rig.describe(name)).block_bytes for name in "ab"]
            answer = await until_answered(client, allow_equivalents=True)
            assert answer.token_ids == expected
            assert answer.info.chain_digest == record.result
            assert answer.info.approximations[0].startswith(f"equivalent:{record.id} mean_kl=")
            assert [(await rig.describe(name)).block_bytes for name in "ab"] == before
            counted = await substituted(rig)
            again = await ask(client, allow_equivalents=True)  # and from the prefix cache of that chain
            assert again.token_ids == expected
            assert await substituted(rig) == counted + 1
            with pytest.raises(BlockzooError):  # who allows nothing gets nothing else
                await ask(client, timeout=2.0)
            revoke(Ledger(zoo.store), record.id, **WHO)
            with pytest.raises(BlockzooError):
                await ask(client, timeout=2.0, allow_equivalents=True)
            assert await substituted(rig) == counted + 1
            await rig.until_clean()

    run(work())


def test_overload_switches_and_recovery_switches_back(made: Made, zoo: Zoo, tmp_path: Path) -> None:
    record = approved(zoo, 2)
    exact, other = made.greedy(made.tuned, 24), made.greedy(made.base, 24)

    async def work() -> None:
        async with cluster(zoo, tmp_path, ["a", "b"], **SETTINGS) as rig, rig.client() as client:
            await rig.load("a", "tuned")
            await until_answered(client)
            await rig.load("b", "base")
            calm = await ask(client, allow_equivalents=True)
            assert (calm.token_ids, calm.info.approximations) == (exact, ())
            async with AsyncExitStack() as stack:
                await overload(rig, client, stack)
                taken = await until_substituted(client)
                loyal = await ask(client)
                assert (loyal.token_ids, loyal.info.approximations) == (exact, ())
                assert taken.token_ids == other
                assert taken.info.chain_digest == record.result == zoo.resolve("base").chain
                assert taken.info.approximations[0].startswith(f"equivalent:{record.id} mean_kl=")
                revoke(Ledger(zoo.store), record.id, **WHO)
                revoked = await ask(client, allow_equivalents=True)
                assert (revoked.token_ids, revoked.info.approximations) == (exact, ())
            approve(Ledger(zoo.store), record.id, max_kl=100.0, **WHO)
            await rig.until_clean()
            await until_told_idle(rig, "a")  # by then the new approval has been noticed, too
            for _ in range(5):
                recovered = await ask(client, allow_equivalents=True)
                assert (recovered.token_ids, recovered.info.approximations) == (exact, ())

    run(work())


async def overload(rig: Cluster, client: AsyncClient, stack: AsyncExitStack) -> None:
    """Have requests run on the variant's own worker that go on until the stack is left."""
    for _ in range(CROWD):
        answer = client.generate("tuned", PROMPT, max_tokens=CROWD_TOKENS, ignore_eos=True)
        chunks = await stack.enter_async_context(aclosing(answer))
        await anext(aiter(chunks))
