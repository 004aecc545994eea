"""Real processes, real Redis: where the time of a request went that two workers executed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from blockserve.common.api.call_trace import CallTrace, ChoiceTrace
from blockserve.common.errors import RequestNotFoundError
from blockserve.router.traces.parts import PartKind, parts_of
from blockzoo.zoo import Zoo
from support.cluster import PATIENCE, Cluster, cluster
from support.forked import run_blockzoo

PROMPT = "Every tenant sends requests"
NUM_TOKENS = 40
LONG = 400
SETTINGS = {
    "BLOCKZOO_ENGINE_DTYPE": "float32",
    "BLOCKZOO_ENGINE_NUM_THREADS": "1",
    "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(16 << 20),
    "BLOCKZOO_ROUTER_TRACED_REQUESTS": "3",
}


@pytest.fixture
def zoo(base_zoo: Zoo) -> Zoo:
    return base_zoo


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 3 * PATIENCE))


def options(tokens: int, **more: Any) -> dict[str, Any]:
    return {"max_tokens": tokens, "ignore_eos": True, "temperature": 0, **more}


def check_sums(choice: ChoiceTrace) -> None:
    """All that was measured lies within the time from the call's arrival to the answer's end."""
    parts = parts_of(choice)
    assert all(part.seconds >= -1e-9 for part in parts)
    assert sum(part.seconds for part in parts) == pytest.approx(choice.seconds)
    for path in choice.paths:
        assert path.choosing + path.moving + path.running <= choice.seconds


async def ended(rig: Cluster, request_id: str) -> CallTrace:
    """The trace of a call, once its workers have ended it as well."""
    async with rig.client() as client, asyncio.timeout(PATIENCE):
        while True:
            (call,) = await client.trace(request_id)
            steps = [step for choice in call.choices for path in choice.paths for step in path.steps]
            if not any(step.times and step.times.running for step in steps):
                return call
            await asyncio.sleep(0.01)


def test_a_finished_request_has_both_spans(zoo: Zoo, tmp_path: Path) -> None:
    async def work() -> None:
        async with cluster(zoo, tmp_path, ("a", "b"), **SETTINGS) as rig:
            await rig.load("a", "base", 0, 2)
            await rig.load("b", "base", 2)
            end = len(zoo.chain(zoo.resolve("base").chain).links)
            async with rig.client() as client:
                answer = await client.generate(
                    "base", PROMPT, **options(NUM_TOKENS, request_id="one")
                ).result()
                call = await ended(rig, "one")
                assert (call.outcome, call.model, call.version) == ("finished", "base", 1)
                (choice,) = call.choices
                (path,) = choice.paths
                assert [(step.name, step.run.first, step.run.end) for step in path.steps] == [
                    ("a", 0, 2),
                    ("b", 2, end),
                ]
                head, tail = (step.times for step in path.steps)
                assert head is not None
                assert tail is not None
                prompt = answer.info.prompt_tokens
                for times in (head, tail):
                    assert (times.prompt.tokens, times.decode.tokens) == (prompt, NUM_TOKENS - 1)
                    assert times.attempts >= 1
                assert head.prompt.round_trips == 1
                assert head.decode.round_trips == NUM_TOKENS - 1
                assert head.seconds <= path.running
                assert tail.decode.here <= head.decode.away
                check_sums(choice)
                kinds = [part.kind for part in parts_of(choice)]
                assert kinds.count(PartKind.SPAN) == 2
                assert PartKind.HOPS in kinds
                assert PartKind.UNKNOWN not in kinds
                await _check_choices(rig)
                await _check_forgotten(rig)
                await _check_verb(rig, "several")

    run(work())


async def _check_choices(rig: Cluster) -> None:
    """The caller's id shows all its answers."""
    async with rig.client() as client:
        wishes = options(8, request_id="several", n=3) | {"temperature": 1.0, "seed": 3}
        await client.generate("base", PROMPT, **wishes).results()
    call = await ended(rig, "several")
    assert [choice.tokens for choice in call.choices] == [8, 8, 8]
    for choice in call.choices:
        check_sums(choice)
        times = choice.paths[0].steps[1].times
        assert times is not None
        assert times.decode.tokens == 7


async def _check_forgotten(rig: Cluster) -> None:
    """Three ended requests are remembered."""
    async with rig.client() as client:
        for number in range(2):
            await client.generate("base", PROMPT, **options(2, request_id=f"later {number}")).result()
        with pytest.raises(RequestNotFoundError, match="no request 'one'") as caught:
            await client.trace("one")
        assert "the last 3 that ended" in caught.value.hint


async def _check_verb(rig: Cluster, request_id: str) -> None:
    words = ("trace", request_id, "--server", rig.routers[0].address)
    done = await asyncio.to_thread(run_blockzoo, *words)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert out.startswith(f"request {request_id}  base@1, ")
    assert out.count("path 0: a -> b") == 3
    assert out.count("\ntotal ") == 3


def test_a_request_that_lost_a_worker_has_two_paths(zoo: Zoo, tmp_path: Path) -> None:
    async def work() -> None:
        async with cluster(zoo, tmp_path, ("a", "b", "c"), **SETTINGS) as rig:
            await rig.load("a", "base", 0, 2)
            await rig.load("b", "base", 2)
            async with rig.client() as client:
                chunks = aiter(client.generate("base", PROMPT, **options(LONG, request_id="hurt")))
                told = [await anext(chunks) for _ in range(5)]
                (path,) = (await client.trace("hurt"))[0].choices[0].paths
                assert [step.name for step in path.steps] == ["a", "b"]
                cluster_status = (await client.status()).cluster
                assert cluster_status is not None
                (running,) = cluster_status.paths
                assert ([step.name for step in running.steps], running.requests) == (["a", "b"], 1)
                await rig.load("c", "base", 2)
                rig.workers["b"].kill()
                told += [chunk async for chunk in chunks]
                assert sum(len(chunk.token_ids) for chunk in told) == LONG
                call = await ended(rig, "hurt")
                (choice,) = call.choices
                first, second = choice.paths
                assert ([step.name for step in first.steps], first.epoch) == (["a", "b"], 0)
                assert ([step.name for step in second.steps], second.epoch) == (["a", "c"], 1)
                assert first.ended
                assert not second.ended
                assert second.moved == "recompute: owner_lost"
                assert first.steps[0].times is not None
                assert first.steps[1].times is None  # it is gone
                assert all(step.times for step in second.steps)
                assert PartKind.UNKNOWN in [part.kind for part in parts_of(choice) if part.epoch == 0]
                check_sums(choice)
                head = second.steps[0].times
                assert head is not None
                decoded = first.steps[0].times.decode.round_trips + first.steps[0].times.prompt.round_trips
                assert decoded + head.decode.round_trips + head.prompt.round_trips == LONG
                cluster_status = (await client.status()).cluster
                assert cluster_status is not None
                assert cluster_status.paths == ()

    run(work())
