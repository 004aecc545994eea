"""Processes on machines whose disk returns EIO, whose clock is wrong, or whose engine has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from blockserve.client.aio import AsyncClient
from blockzoo.zoo import Zoo
from support import neighbour
from support.chaos import JUMPS
from support.cluster import PATIENCE, Cluster, cluster
from support.faults import Broken, Faults, library
from support.forked import run_blockzoo
from support.variants import VariantFactory

SETTINGS = {
    "BLOCKZOO_ENGINE_DTYPE": "float32",
    "BLOCKZOO_ENGINE_NUM_THREADS": "1",
    "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(16 << 20),
}
PROMPT = "Every tenant sends requests"
NUM_TOKENS = 40
SOON_SECONDS = 10.0
"""Less than a worker waits before it reads again what it could not read."""

needs_compiler = pytest.mark.skipif(library() is None, reason="no C compiler to make faults with")


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 2 * PATIENCE))


async def answer(client: AsyncClient, model: str, num_tokens: int = NUM_TOKENS) -> tuple[int, ...]:
    stream = client.generate(model, PROMPT, temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return tuple([token async for chunk in stream for token in chunk.token_ids])


@pytest.fixture
def zoo(factory: VariantFactory, base_zoo: Zoo) -> Zoo:
    """A base, and two models of another family that share nothing with it."""
    base_zoo.register(factory.checkpoint("qwen3").path, name="other")
    base_zoo.register(factory.checkpoint("llama-gqa-tied").path, name="twin")
    return base_zoo


def faults_of(rig: Cluster, folder: Path, name: str) -> Faults:
    """Faults of a process that is started afterwards with `environment`."""
    return Faults(folder / f"{name}.faults", folder / "zoo")


@needs_compiler
def test_what_one_worker_cannot_read_is_placed_at_another(zoo: Zoo, tmp_path: Path) -> None:
    """The worker that was given the chain has a sick disk: the caller hears nothing of it, and soon."""

    async def work() -> None:
        async with cluster(zoo, tmp_path, [], **SETTINGS) as rig:
            sick = faults_of(rig, tmp_path, "sick")
            await rig.start_worker("sick", **sick.environment)
            await rig.start_controller(BLOCKZOO_LOOK_SECONDS="0.3")
            async with rig.client() as client:
                with sick.broken(Broken.READS):
                    asking = asyncio.create_task(answer(client, "other"))
                    while "not loaded" not in rig.log("sick"):
                        await asyncio.sleep(0.02)
                    await rig.start_worker("well")
                    async with asyncio.timeout(SOON_SECONDS):
                        tokens = await asking
                assert sick.num_failed
                assert await answer(client, "other") == tokens

    run(work())


@needs_compiler
def test_a_controller_that_cannot_read_the_zoo_lets_another_lead(zoo: Zoo, tmp_path: Path) -> None:
    """What is placed stays placed, although the leader cannot say what it is made of."""

    async def work() -> None:
        async with cluster(zoo, tmp_path, ["a"], **SETTINGS) as rig:
            faults = [faults_of(rig, tmp_path, f"controller{i}") for i in range(2)]
            look = {"BLOCKZOO_LOOK_SECONDS": "0.3"}
            async with rig.client() as client:
                await rig.start_controller(**look, **faults[0].environment)
                first = await answer(client, "base")
                placed = (await rig.view()).placement
                with ExitStack() as broken:
                    broken.enter_context(faults[0].broken(Broken.READS))
                    await rig.start_controller(**look, **faults[1].environment)
                    asking = asyncio.create_task(answer(client, "other"))
                    async with asyncio.timeout(PATIENCE):
                        while "leading token=" not in rig.log("controller1"):
                            await asyncio.sleep(0.02)
                        await asking
                assert "the zoo cannot be read" in rig.log("controller0")
                assert "let go" not in rig.log("a")
                held = (await rig.view()).placement.workers
                assert all(set(runs) <= set(held[worker]) for worker, runs in placed.workers.items())
                assert await answer(client, "base") == first

    run(work())


@needs_compiler
@pytest.mark.parametrize("what", [Broken.READS, Broken.WRITES], ids=["reads", "writes"])
def test_a_registration_on_a_sick_disk_leaves_a_valid_zoo(
    factory: VariantFactory, zoo: Zoo, tmp_path: Path, what: Broken
) -> None:
    faults, before = Faults(tmp_path / "faults", tmp_path / "zoo"), zoo.variants()
    words = ("register", str(factory.adapter(factory.checkpoint("llama-gqa-tied"), "patterns").path))
    words += ("--name", "new", "--base", "base", "--zoo", str(tmp_path / "zoo"))
    with faults.broken(what):
        failed = run_blockzoo(*words, **faults.environment)
    assert failed.returncode == 1, failed.stderr
    assert faults.num_failed
    assert "Input/output error" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert zoo.variants() == before
    assert zoo.verify().problems == ()
    done = run_blockzoo(*words, **faults.environment)
    assert done.returncode == 0, done.stderr
    assert zoo.verify().problems == ()


@needs_compiler
@pytest.mark.parametrize("seconds", [JUMPS[0], JUMPS[2]])
@pytest.mark.parametrize("verb", ["register", "gc"])
def test_a_machine_with_the_wrong_time_does_not_touch_the_zoo(
    factory: VariantFactory, zoo: Zoo, tmp_path: Path, verb: str, seconds: float
) -> None:
    """The file system, as a network's would, stamps files by its own clock."""
    faults = Faults(tmp_path / "faults", tmp_path / "zoo")
    faults.set_clock(seconds)
    zoo.store.remove("other")
    path = str(factory.adapter(factory.checkpoint("llama-gqa-tied"), "patterns").path)
    words = {"register": ("register", path, "--name", "new", "--base", "base"), "gc": ("gc", "--grace", "0")}
    before = {info.key for info in zoo.store.storage.list("")}
    failed = run_blockzoo(*words[verb], "--zoo", str(tmp_path / "zoo"), **faults.environment)
    assert failed.returncode == 1, failed.stderr
    assert ("ahead of" if seconds > 0 else "behind") in failed.stderr
    assert before <= {info.key for info in zoo.store.storage.list("")}


@pytest.mark.parametrize("threads", ["2", pytest.param("1", marks=pytest.mark.long)])
def test_an_engine_that_ends_takes_its_worker_with_it(zoo: Zoo, tmp_path: Path, threads: str) -> None:
    """Its requests go on at the other worker; the process says why and ends, for its supervisor to see."""

    async def work() -> None:
        settings = {**SETTINGS, "BLOCKZOO_ENGINE_NUM_THREADS": threads}
        async with cluster(zoo, tmp_path, [], **settings) as rig:
            rig.launchers["dying"] = neighbour.launcher("--engine-ends-after", "20")
            await rig.start_worker("dying")
            await rig.start_worker("well")
            for name in ("dying", "well"):
                await rig.load(name, "base")
            async with rig.client() as client:
                answers = await asyncio.gather(*(answer(client, "base", 60) for _ in range(4)))
                dying = rig.workers["dying"].popen
                assert dying is not None
                assert await asyncio.to_thread(dying.wait, PATIENCE) == 1
                assert "goes on elsewhere" in rig.log("router0")
                assert "the engine" in rig.log("dying")
                assert set(answers) == {await answer(client, "base", 60)}
                assert await rig.worker_view("dying") is None

    run(work())
