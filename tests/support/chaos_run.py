"""One chaos run: every wish undisturbed, every wish while harm is done, and both compared."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

from blockserve.client.aio import AsyncClient
from blockserve.common.errors import UnavailableError
from support.chaos import ChaosCluster, Harm
from support.chaos_requests import Crowd, Transcript, Wish, assert_same

NUM_CLIENTS = 4
REQUESTS_EACH = 3
"""Requests at a time of each client."""
LONG_WISH = Wish(
    "tuned", "Every tenant sends requests", {"temperature": 0, "max_tokens": 300, "ignore_eos": True}
)


class Impatient:
    """A caller that does not resume: what breaks under it, it is told in a typed error."""

    def __init__(self, rig: ChaosCluster, wish: Wish) -> None:
        self._client = AsyncClient(rig.reach(rig.routers[0]), resume_attempts=0)
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


async def ask(rig: ChaosCluster, wishes: list[Wish], script: Sequence[Harm]) -> dict[int, Transcript]:
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


async def compare(rig: ChaosCluster, wishes: list[Wish], script: Sequence[Harm]) -> None:
    """Ask undisturbed, then harmed: nobody got anything else, and nothing is left behind."""
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
