"""Real processes, real Redis, real gRPC: chains over several workers, and everything that can be lost."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from blockserve.client.aio import AsyncClient
from blockserve.common.api.cluster import WorkerState
from blockserve.common.errors import WorkerNotFoundError
from blockzoo.equivalence import Ledger, approve
from blockzoo.errors import BlockzooError
from blockzoo.evaluation.evaluate import evaluate
from blockzoo.zoo import Zoo
from support.cluster import PATIENCE, Cluster, Process, cluster
from support.variants import Variant, VariantFactory
from support.zoos import copy_zoo

NUM_TOKENS = 150
LEASE_SECONDS = 3.0
"""The default of `state.lease_seconds`."""
PROMPT = "Every tenant sends requests"
SETTINGS = {
    "BLOCKZOO_ENGINE_DTYPE": "float32",
    "BLOCKZOO_ENGINE_NUM_THREADS": "1",
    "BLOCKZOO_ENGINE_KV_PAGE_TOKENS": "8",
    "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(16 << 20),
    "BLOCKZOO_ENGINE_MAX_TOKENS_PER_PASS": "70",
}


@dataclass(frozen=True)
class Made:
    """Three variants that share most of their blocks, and who knows what they answer."""

    factory: VariantFactory
    variants: dict[str, Variant]

    def prompt(self) -> tuple[int, ...]:
        """PROMPT as token ids."""
        return tuple(AutoTokenizer.from_pretrained(self.variants["base"].path)(PROMPT)["input_ids"])

    def greedy(self, name: str, prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
        """What transformers and PEFT answer."""
        (tokens,) = self.factory.oracle(self.variants[name]).greedy([prompt], num_tokens)
        return tokens


@pytest.fixture(scope="module")
def made(factory: VariantFactory) -> Made:
    base = factory.checkpoint("llama-gqa-tied")
    variants = {
        "base": base,
        "adapter": factory.adapter(base, "patterns"),
        "tuned": factory.top_quarter(base),
    }
    return Made(factory, variants)


@pytest.fixture
def zoo(family_zoo: Zoo) -> Zoo:
    return family_zoo


@dataclass
class Transcript:
    """One answer as its caller got it; a token that is lost or repeated fails at once."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    is_finished: bool = False

    async def follow(self, client: AsyncClient, model: str, **options: Any) -> Transcript:
        """Ask and write down."""
        options = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0, **options}
        async for chunk in client.generate(model, PROMPT, **options):
            assert chunk.first_token_index == len(self.tokens)
            self.tokens.extend(chunk.token_ids)
            self.text += chunk.text
            self.is_finished = chunk.finish is not None
        assert self.is_finished
        return self

    async def reaches(self, count: int) -> None:
        """Wait for that many tokens."""
        async with asyncio.timeout(PATIENCE):
            while len(self.tokens) < count:
                await asyncio.sleep(0.001)


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test in an event loop of its own, with a bound below that of the whole test."""
    asyncio.run(asyncio.wait_for(work, 250))


WISHES: list[tuple[str, dict[str, Any]]] = [
    (model, options)
    for model in ("base", "adapter", "tuned")
    for options in ({}, {"temperature": 0.9, "top_p": 0.95, "seed": 11, "repetition_penalty": 1.1})
]
"""Greedy and sampled, of every variant."""


async def ask_all(client: AsyncClient, num_tokens: int = NUM_TOKENS) -> list[Transcript]:
    """Every wish once, all at the same time."""
    asked = (Transcript().follow(client, model, max_tokens=num_tokens, **more) for model, more in WISHES)
    return list(await asyncio.gather(*asked))


async def load_all(rig: Cluster, cuts: dict[str, tuple[int, int]]) -> None:
    """Have workers hold runs of every variant, and wait until the router's view has them."""
    for name, (first, end) in cuts.items():
        for model in ("base", "adapter", "tuned"):
            await rig.load(name, model, first, end)


HALVES = {"a": (0, 3), "b": (3, 0), "c": (0, 3), "d": (3, 0)}
"""Two workers for each half of every chain."""


@pytest.mark.parametrize(
    "cuts",
    [{"a": (0, 3), "b": (3, 0)}, {"a": (0, 2), "b": (2, 3), "c": (3, 4), "d": (4, 0)}],
    ids=["two workers", "four workers"],
)
def test_tokens_are_those_of_transformers_and_of_one_process(
    made: Made, zoo: Zoo, tmp_path: Path, cuts: dict[str, tuple[int, int]]
) -> None:
    num_tokens = 50  # nothing happens on the way, and pages have eight

    async def work() -> None:
        async with cluster(zoo, tmp_path, [*cuts, "whole"], **SETTINGS) as rig:
            await rig.load("whole", "base")
            for model in ("base", "adapter", "tuned"):
                await rig.load("whole", model)
            async with rig.client() as client:
                alone = await ask_all(client, num_tokens)
                await rig.workers["whole"].terminate()
                await load_all(rig, cuts)
                split = await ask_all(client, num_tokens)
                again = [
                    await Transcript().follow(client, model, max_tokens=num_tokens, **more)
                    for model, more in WISHES
                ]
            await rig.until_clean()
            assert [one.tokens for one in split] == [one.tokens for one in alone]
            assert [one.tokens for one in again] == [one.tokens for one in alone]
            assert [one.text for one in split] == [one.text for one in alone]
            for (model, options), one in zip(WISHES, split, strict=True):
                if not options:
                    assert tuple(one.tokens) == made.greedy(model, made.prompt(), num_tokens)
            assert len({tuple(one.tokens) for one in split}) == len(WISHES)
            for name in cuts:
                assert len((await rig.describe(name)).spans) == 3

    run(work())


Harm = Callable[[Cluster], Awaitable[None]]


async def _kill_head(rig: Cluster) -> None:
    await _busy(rig, "a", "c", lambda process: process.kill())


async def _kill_tail(rig: Cluster) -> None:
    await _busy(rig, "b", "d", lambda process: process.kill())


async def _stop_and_wake_tail(rig: Cluster) -> None:
    name = await _busy(rig, "b", "d", lambda process: process.send(signal.SIGSTOP))
    async with asyncio.timeout(PATIENCE):
        while await rig.worker_view(name) is not None:
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    rig.workers[name].send(signal.SIGCONT)


async def _stop_and_wake_head(rig: Cluster) -> None:
    name = await _busy(rig, "a", "c", lambda process: process.send(signal.SIGSTOP))
    async with asyncio.timeout(PATIENCE):
        while await rig.worker_view(name) is not None:
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    rig.workers[name].send(signal.SIGCONT)


async def _roll(rig: Cluster) -> None:
    """Every worker is told to go and started again, one after another."""
    for name, (first, end) in HALVES.items():
        assert await rig.workers[name].terminate() == 0
        await rig.start_worker(name, BLOCKZOO_DRAIN_SECONDS="0.2")
        for model in ("base", "adapter", "tuned"):
            await rig.load(name, model, first, end)


async def _kill_router(rig: Cluster) -> None:
    address = rig.routers[0].address
    rig.routers[0].kill()
    await rig.start_router(address)


async def _kill_router_and_head(rig: Cluster) -> None:
    """Nobody has the journal any more but the client: it resumes with request_id and resume_from."""
    address = rig.routers[0].address

    def both(head: Process) -> None:
        rig.routers[0].kill()
        head.kill()

    await _busy(rig, "a", "c", both)
    await rig.start_router(address)


async def _flush_state(rig: Cluster) -> None:
    for _ in range(3):
        await asyncio.to_thread(rig.state.flush)
        await asyncio.sleep(0.3)


async def _pause_state(rig: Cluster) -> None:
    with rig.state.paused():
        await asyncio.sleep(LEASE_SECONDS + 1.5)


async def _replace_state(rig: Cluster) -> None:
    await asyncio.to_thread(rig.state.kill)
    await asyncio.sleep(LEASE_SECONDS + 1.5)
    await asyncio.to_thread(rig.state.restart)


async def _busy(rig: Cluster, one: str, other: str, harm: Callable[[Any], None]) -> str:
    """Harm whichever of two replicas runs requests now."""
    async with asyncio.timeout(PATIENCE):
        while True:
            for name in (one, other):
                if (await rig.describe(name)).running_requests:
                    harm(rig.workers[name])
                    return name


async def _has_full_pages(rig: Cluster, name: str) -> None:
    """Wait until a request at a worker has more than a page: with less there is nothing to transfer."""
    async with asyncio.timeout(PATIENCE):
        while True:
            said = await rig.describe(name)
            # Each half has the embedding or the head beside its layers.
            num_layers = max(span.end - span.first - 1 for span in said.spans)
            if said.running_requests and said.kv_pages_used > said.running_requests * num_layers:
                return


async def _drain(rig: Cluster) -> None:
    """Two workers give their requests back, then take some again."""
    async with rig.client() as client:
        for name in ("a", "b"):
            await _has_full_pages(rig, name)
            await client.drain_worker(name, 0.0)
            assert not (await rig.describe(name)).running_requests
            await asyncio.sleep(0.3)
            await client.drain_worker(name, 0.0, resume=True)
        with pytest.raises(WorkerNotFoundError, match="no worker 'e'"):
            await client.drain_worker("e", 0.0)


MOVING_SETTINGS = SETTINGS | {"BLOCKZOO_DRAIN_SECONDS": "0.2", "BLOCKZOO_KV_CHOICE": "transfer"}


@pytest.fixture(scope="module")
def undisturbed(family_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Transcript]:
    """What such a cluster answers to every wish when nothing happens to it; not to be changed."""
    folder, answers = tmp_path_factory.mktemp("undisturbed"), list[Transcript]()
    zoo = copy_zoo(family_folder, folder / "zoo")

    async def work() -> None:
        async with cluster(zoo, folder, HALVES, **MOVING_SETTINGS) as rig:
            await load_all(rig, HALVES)
            async with rig.client() as client:
                answers.extend(await ask_all(client))
            assert "goes on elsewhere" not in rig.log("router0")

    run(work())
    return answers


MOVING = (_kill_head, _kill_tail, _stop_and_wake_tail, _stop_and_wake_head, _roll, _drain)
"""What makes requests change workers."""


ALSO_IN_CHAOS = (
    _kill_head,
    _kill_tail,
    _stop_and_wake_tail,
    _stop_and_wake_head,
    _roll,
    _kill_router,
    _flush_state,
    _pause_state,
    _replace_state,
)
"""Harms that `test_nobody_notices` of test_chaos.py does, too, among requests of more kinds."""


@pytest.mark.parametrize(
    "harm",
    [
        _drain,
        _kill_router_and_head,
        *(pytest.param(harm, marks=pytest.mark.long) for harm in ALSO_IN_CHAOS),
    ],
)
def test_no_token_is_lost_or_repeated(
    undisturbed: list[Transcript], zoo: Zoo, tmp_path: Path, harm: Harm
) -> None:
    """Two replicas of each half; whatever is lost, every transcript is that of an undisturbed run."""

    async def work() -> None:
        async with cluster(zoo, tmp_path, HALVES, **MOVING_SETTINGS) as rig:
            await load_all(rig, HALVES)
            async with rig.client() as client:
                rounds: list[list[Transcript]] = []

                async def go_on() -> None:
                    while not hurt.done() or not rounds:
                        rounds.append(await ask_all(client))

                async def do_harm() -> None:
                    await _busy(rig, "b", "d", lambda _: None)
                    await asyncio.sleep(0.05)
                    await harm(rig)

                hurt = asyncio.create_task(do_harm())
                await asyncio.gather(go_on(), hurt)
                rounds.append(await ask_all(client))
            await rig.until_clean()
            moved = sum("goes on elsewhere" in line for line in rig.log("router0").splitlines())
            assert (moved > 0) == (harm in MOVING), moved
            if harm is _drain:
                assert "kv transfer reason=cheaper" in rig.log("router0")
            for disturbed in rounds:
                assert [one.tokens for one in disturbed] == [one.tokens for one in undisturbed]
                assert [one.text for one in disturbed] == [one.text for one in undisturbed]

    run(work())


def test_pages_follow_to_workers_that_are_cut_at_another_layer(zoo: Zoo, tmp_path: Path) -> None:
    """One copy is cut before position 3, the other before 2: who drains, the other copy takes over."""

    async def work() -> None:
        cuts = {"a": (0, 3), "b": (3, 0), "c": (0, 2), "d": (2, 0)}
        async with cluster(zoo, tmp_path, cuts, **SETTINGS, BLOCKZOO_KV_CHOICE="transfer") as rig:
            await load_all(rig, cuts)
            async with rig.client() as client:
                for (model, options), undisturbed in zip(WISHES, await ask_all(client), strict=True):
                    disturbed = Transcript()
                    answer = asyncio.create_task(disturbed.follow(client, model, **options))
                    await disturbed.reaches(NUM_TOKENS // 3)
                    drained = await _busy(rig, "a", "c", lambda _: None)
                    await client.drain_worker(drained, 0.0)
                    await answer
                    assert disturbed.tokens == undisturbed.tokens
                    assert disturbed.text == undisturbed.text
                    await client.drain_worker(drained, 0.0, resume=True)
                    await _known_as_ready(rig, drained)
            await rig.until_clean()
            lines = [line for line in rig.log("router0").splitlines() if " kv " in line]
            assert len(lines) == len(WISHES)
            assert all("kv transfer reason=cheaper" in line for line in lines), lines

    run(work())


async def _known_as_ready(rig: Cluster, name: str) -> None:
    """Wait until the shared state says that a worker takes requests."""
    async with asyncio.timeout(PATIENCE):
        while (view := await rig.worker_view(name)) is None or view.record.state is not WorkerState.READY:
            await asyncio.sleep(0.02)


def test_the_controller_places_what_is_asked_for(made: Made, zoo: Zoo, tmp_path: Path) -> None:
    """Nothing is loaded by hand: requests are the demand, a lost worker's blocks are placed again."""

    async def work() -> None:
        folder = made.variants["adapter"].path
        allowed = {"BLOCKZOO_ALLOW_UNREGISTERED": json.dumps([str(folder)])}
        async with cluster(zoo, tmp_path, ["a", "b"], **SETTINGS, **allowed) as rig:
            await asyncio.gather(rig.start_controller(), rig.start_controller())
            async with rig.client() as client:
                first = await ask_all(client)
                placed = await Transcript().follow(client, f"base+path:{folder}")
                zoo.register(made.variants["base"].path, name="later")
                later = await Transcript().follow(client, "later")
                rig.workers["a"].kill()
                rig.controllers[0].kill()
                after = await ask_all(client)
                await rig.start_worker("c")
                rig.workers["b"].kill()
                last = await ask_all(client)
            await rig.until_clean()
            assert tuple(later.tokens) == made.greedy("base", made.prompt(), NUM_TOKENS)
            assert tuple(placed.tokens) == made.greedy("adapter", made.prompt(), NUM_TOKENS)
            for answers in (after, last):
                assert [one.tokens for one in answers] == [one.tokens for one in first]

    run(work())


def test_an_approved_equivalent_answers_while_the_exact_blocks_are_absent(
    made: Made, zoo: Zoo, tmp_path: Path
) -> None:
    text = " ".join(f"line {number} of what tenants send" for number in range(60))
    record = evaluate(zoo, "tuned", "base", text, max_tokens=256)[-1]
    ledger = Ledger(zoo.store)
    approve(ledger, record.id, by="test", reason="test", max_kl=100.0)

    async def work() -> None:
        async with cluster(zoo, tmp_path, ["a"], **SETTINGS, BLOCKZOO_FAILOVER_PATH_SECONDS="0.5") as rig:
            await rig.load("a", "base")
            async with rig.client() as client:

                async def ask(**more: Any) -> Any:
                    return await client.generate(
                        "tuned", PROMPT, max_tokens=24, temperature=0, ignore_eos=True, **more
                    ).result()

                await Transcript().follow(client, "base")
                other = await ask(allow_equivalents=True)
                assert other.token_ids == made.greedy("base", made.prompt(), 24)
                assert other.info.chain_digest == zoo.resolve("base").chain
                assert other.info.approximations[0].startswith(f"equivalent:{record.id} mean_kl=")
                with pytest.raises(BlockzooError):  # who allows nothing gets nothing else
                    await asyncio.wait_for(ask(timeout=2.0), 20)
                await rig.load("a", "tuned")
                while not any("tuned" in name for name in await loaded(client)):
                    await asyncio.sleep(0.05)
                exact = await ask(allow_equivalents=True)
                assert exact.token_ids == made.greedy("tuned", made.prompt(), 24)
                assert exact.info.approximations == ()

    async def loaded(client: AsyncClient) -> list[str]:
        return [model.name for model in await client.models() if model.loaded]

    run(work())
