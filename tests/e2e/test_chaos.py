"""A seeded script of harms to a cluster under requests of every kind: nobody notices.

BLOCKZOO_CHAOS_SEED="5,8" runs other seeds; what happens when is a function of the seed alone.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch

from blockkernels.linear import can_pack
from blockserve.common.errors import UnavailableError
from blockserve.router.aio_client import AsyncClient
from blockserve.worker import executor
from blockzoo.zoo import Zoo
from support.chaos import FEW, KINDS, WITHOUT_CONTROLLERS, ChaosCluster, Harm, chaos_cluster, make_script
from support.chaos_requests import Crowd, Transcript, Wish, assert_same, make_wishes
from support.variants import VariantFactory

SEEDS = [int(seed) for seed in os.environ.get("BLOCKZOO_CHAOS_SEED", "1").split(",")]
MODELS = ("base", "first", "second", "tuned", "other")
NUM_CLIENTS = 4
REQUESTS_EACH = 3
"""Requests at a time of each client."""
LONG_WISH = Wish(
    "tuned", "Every tenant sends requests", {"temperature": 0, "max_tokens": 300, "ignore_eos": True}
)
Settings = dict[str, str]
FP32 = {"BLOCKZOO_ENGINE_DTYPE": "float32"}
BF16 = {"BLOCKZOO_ENGINE_DTYPE": "bfloat16", "BLOCKZOO_ENGINE_DETERMINISTIC": "true"}

needs_bf16 = pytest.mark.skipif(
    executor.library() is None or not can_pack(torch.bfloat16, torch.device("cpu")),
    reason="this machine has no compiler, or no bfloat16 products",
)


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> VariantFactory:
    return VariantFactory(tmp_path_factory.mktemp("variants"))


@pytest.fixture
def zoo(factory: VariantFactory, tmp_path: Path) -> Zoo:
    """One base with two adapters and a tuned top quarter, and a base of another family."""
    base = factory.checkpoint("llama-gqa-tied")
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(base.path, name="base")
    zoo.register(factory.adapter(base, "patterns").path, name="first", base="base")
    zoo.register(factory.adapter(base, "all-linear", seed=2).path, name="second", base="base")
    zoo.register(factory.top_quarter(base).path, name="tuned")
    zoo.register(factory.checkpoint("qwen3").path, name="other")
    return zoo


class Impatient:
    """A caller that does not resume: what breaks under it, it is told in a typed error."""

    def __init__(self, rig: ChaosCluster, wish: Wish) -> None:
        self._client = AsyncClient(rig.routers[0].address, resume_attempts=0)
        self.transcript = Transcript(wish)
        self._task = asyncio.create_task(self.transcript.follow(self._client))

    async def until_running(self) -> None:
        """Wait for its first token."""
        while not self._task.done() and not self.transcript.num_tokens:
            await asyncio.sleep(0.001)

    async def end(self) -> None:
        """Wait for its end; an error that is not typed is raised here."""
        try:
            await self._task
        finally:
            await self._client.close()

    def check(self, harm: Harm, expected: Transcript) -> None:
        """Told the truth as far as it was told anything; only the death of the router reaches callers."""
        if harm.kind == "kill router":
            assert isinstance(self.transcript.error, UnavailableError), self.transcript
            for mine, whole in zip(self.transcript.answers, expected.answers, strict=True):
                assert mine.tokens == whole.tokens[: len(mine.tokens)]
                assert whole.text.startswith(mine.text)
        else:
            assert_same(self.transcript, expected)


async def ask(rig: ChaosCluster, wishes: list[Wish], script: list[Harm]) -> dict[int, Transcript]:
    """Every wish once, while the script happens: a share of the wishes is let go for each harm."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(rig.client()) for _ in range(NUM_CLIENTS)]
        crowd = Crowd(clients, REQUESTS_EACH)
        crowd.start()
        stack.push_async_callback(crowd.close)
        impatient: list[Impatient] = []
        for i, harm in enumerate(script):
            first, end = (len(wishes) * j // len(script) for j in (i, i + 1))
            crowd.release(wishes[first:end])
            started = time.monotonic()
            try:
                caller = Impatient(rig, LONG_WISH)
                impatient.append(caller)
                await caller.until_running()
                await harm.happen(rig, crowd)
                happened = time.monotonic()
                await crowd.until_done()
                await caller.end()
            except BaseException as error:
                error.add_note(f"at harm {i}: {harm}")
                raise
            print(f"{harm} took {happened - started:.2f} s, answers {time.monotonic() - started:.2f} s")
        if not script:
            crowd.release(wishes)
            await crowd.until_done()
        else:
            whole = await Transcript(LONG_WISH).follow(clients[0])
            for caller, harm in zip(impatient, script, strict=True):
                caller.check(harm, whole)
        return crowd.transcripts


async def chaos(zoo: Zoo, folder: Path, wishes: list[Wish], script: list[Harm], settings: Settings) -> None:
    """One run: undisturbed, harmed, compared."""
    is_placed = any(harm.kind == "kill controller" for harm in script)
    async with chaos_cluster(zoo, folder, MODELS, is_placed=is_placed, **settings) as rig:
        expected = await ask(rig, wishes, [])
        assert not moved(rig)
        got = await ask(rig, wishes, script)
        assert len(got) == len(expected) == len(wishes)
        for wish in wishes:
            assert_same(got[id(wish)], expected[id(wish)])
        assert any(answer.finish and answer.finish.matched for one in got.values() for answer in one.answers)
        assert moved(rig) > 0
        await rig.until_clean()


def moved(rig: ChaosCluster) -> int:
    """How often a request went on along another path."""
    return rig.log("router0").count("goes on elsewhere")


def run(
    zoo: Zoo, folder: Path, seed: int, count: int, kinds: Collection[str], settings: Settings, rounds: int = 1
) -> None:
    """Run in an event loop, and say on failure how to get there again."""
    try:
        wishes, script = make_wishes(seed, MODELS, count), make_script(seed, kinds, rounds)
        asyncio.run(chaos(zoo, folder, wishes, script, settings))
    except BaseException as error:
        error.add_note(f"BLOCKZOO_CHAOS_SEED={seed} repeats it; logs are in {folder}")
        raise


@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_notices(zoo: Zoo, tmp_path: Path, seed: int) -> None:
    """Two replicas of each half."""
    run(zoo, tmp_path, seed, 200, WITHOUT_CONTROLLERS, FP32)


@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_notices_where_controllers_place(zoo: Zoo, tmp_path: Path, seed: int) -> None:
    """What a worker held is placed anew when it is lost."""
    run(zoo, tmp_path, seed, 50, FEW, FP32)


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_notices_any_harm_where_controllers_place(zoo: Zoo, tmp_path: Path, seed: int) -> None:
    run(zoo, tmp_path, seed, 200, KINDS, FP32)


@pytest.mark.long
@needs_bf16
@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_notices_in_bf16(zoo: Zoo, tmp_path: Path, seed: int) -> None:
    run(zoo, tmp_path, seed, 200, WITHOUT_CONTROLLERS, BF16)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("settings", [FP32, pytest.param(BF16, marks=needs_bf16)], ids=["fp32", "bf16"])
def test_nobody_notices_for_long(zoo: Zoo, tmp_path: Path, seed: int, settings: Settings) -> None:
    run(zoo, tmp_path, seed, 2000, WITHOUT_CONTROLLERS, settings, rounds=10)
