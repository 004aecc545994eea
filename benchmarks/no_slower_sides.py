"""What no_slower.py measures: the processes of both builds in each case, and how they are sampled."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Protocol, TypeVar

from builds import Build
from cluster import (
    LocalCluster,
    Process,
    base_model,
    local_cluster,
    make_zoo,
    pinned_to,
    tiny_model,
    two_cores,
)
from fake_worker import SEPARATE
from harness import check, has_bf16
from hop import HOPS, Steps, decode, start_workers
from peers.engines import Measured, ask, session_cpu_seconds
from peers.lora import ADAPTERS, LORA, mixed_batch, register_adapters
from peers.one_variant import SINGLE, single_batch
from peers.turns import Options, agree, check_lengths
from peers.workload import Batch, Request
from program import Say, Scale
from router_rps import IN_FLIGHT, TOKENS, WARM_SECONDS, load
from served import MODEL, Server, fresh_folder, random_adapters, serve

from blockserve.client.aio import AsyncClient

WARM_UP = -1
ZOO = "no-slower-zoo"
BATCHES = {"single-8": 4, "lora8-32": 1}
"""Batches of a sample."""
SHORTENED = {"single-8": 2, "lora8-32": 4}
"""How many times shorter prompts and answers are on a processor that does not multiply bfloat16. A sample is
one batch there, and takes some ten seconds too."""
HOP_TOKENS, HOP_PAIRS = 100, 8
"""Tokens of an answer, and pairs of answers of a sample: short ones, over one worker and two in turns."""
ROUTER_SECONDS = 6.0

Builds = tuple[Build, Build]
Workload = Callable[[int], Sequence[Request]]


class Side(Measured, Protocol):
    """The processes of one build in one case."""

    async def turn(self, number: int) -> float:
        """Take one sample.

        Args:
            number: of the turn; both builds are asked the same in turns of equal numbers. `WARM_UP` comes
                first and does not count.
        """
        ...


@dataclass(frozen=True, slots=True)
class Sides:
    """Both builds in one case.

    Attributes:
        text: what is done, in words.
        ours: this tree.
        base: the other commit.
        same: checks that both did the same work, after the last turn; what it found, in words.
    """

    text: str
    ours: Side
    base: Side
    same: Callable[[], str]


S = TypeVar("S", bound=Side)


class Serving:
    """`blockzoo serve`, asked over gRPC; samples are output tokens per second."""

    def __init__(
        self, name: str, server: Server, client: AsyncClient, workload: Workload, per_turn: int
    ) -> None:
        """Ask `per_turn` batches of the workload in each turn, one after the other."""
        self.name = name
        self.batches: list[Batch] = []
        self._server = server
        self._client = client
        self._workload = workload
        self._per_turn = per_turn

    async def turn(self, number: int) -> float:
        """See `Side`."""
        first = number * self._per_turn
        taken = [await self._ask(one) for one in range(first, first + self._per_turn)]
        if number != WARM_UP:
            self.batches += taken
        tokens = sum(len(answer.tokens) for batch in taken for answer in batch.answers)
        return tokens / sum(batch.seconds for batch in taken)

    async def _ask(self, number: int) -> Batch:
        requests = self._workload(number)
        batch = await ask(self._client, requests)
        check_lengths(self.name, requests, batch)
        return batch

    def cpu_seconds(self) -> float:
        """See `Measured`."""
        return session_cpu_seconds(self._server.pid)


@asynccontextmanager
async def _serving(build: Build, zoo: Path, workload: Workload, per_turn: int) -> AsyncIterator[Serving]:
    with serve(zoo, "--preload", "all", build=build) as server:
        async with AsyncClient(server.address) as client:
            await client.wait_ready(30)
            yield Serving(build.name, server, client, workload, per_turn)


def _same_answers(ours: Serving, base: Serving) -> str:
    return agree(ours.batches, base.batches)


@asynccontextmanager
async def open_single(builds: Builds, scale: Scale, say: Say) -> AsyncIterator[Sides]:
    """Servers of one model."""
    zoo = make_zoo(ZOO, {"base": MODEL})
    asked = _asked("single-8", scale, say)
    workload = single_batch("single-8", asked.options)
    async with _both_serving(builds, zoo, workload, asked, asked.in_words(*SINGLE["single-8"])) as sides:
        yield sides


@asynccontextmanager
async def open_lora(builds: Builds, scale: Scale, say: Say) -> AsyncIterator[Sides]:
    """Servers of one model with adapters, all of them in every batch."""
    adapters = random_adapters(ADAPTERS)
    zoo = fresh_folder(ZOO)
    register_adapters(zoo, adapters)
    asked = _asked("lora8-32", scale, say)
    workload = mixed_batch("lora8-32", adapters, asked.options)
    text = f"{asked.in_words(*LORA['lora8-32'])}, over {ADAPTERS} LoRA r16 on all linear modules"
    async with _both_serving(builds, zoo, workload, asked, text) as sides:
        yield sides


@dataclass(frozen=True, slots=True)
class Asked:
    """How much a server is asked in a turn.

    Attributes:
        options: how long prompts and answers are.
        batches: how many, one after the other.
    """

    options: Options
    batches: int

    def in_words(self, count: int, prompt: int, tokens: int) -> str:
        """What the case does, for batches of `count` requests that are so long where nothing is shortened."""
        return (
            f"SmolLM2-135M bf16 over gRPC, {count} x {self.options.prompt(prompt)} in, "
            f"{self.options.tokens(tokens)} out, greedy, {self.batches} batches a sample"
        )


def _asked(case: str, scale: Scale, say: Say) -> Asked:
    """As much as this processor does in some ten seconds."""
    if has_bf16():
        return Asked(Options(scale.runs, scale.quick, say), 1 if scale.quick else BATCHES[case])
    return Asked(Options(scale.runs, scale.quick, say, shortened=SHORTENED[case]), 1)


def _both_serving(
    builds: Builds, zoo: Path, workload: Workload, asked: Asked, text: str
) -> AbstractAsyncContextManager[Sides]:
    open_one = partial(_serving, zoo=zoo, workload=workload, per_turn=asked.batches)
    return _both(builds, open_one, text, _same_answers)


class Hopping:
    """Workers, spoken to as a router does; samples are seconds that a hop adds to a token."""

    def __init__(
        self, name: str, cluster: LocalCluster, paths: tuple[Steps, Steps], tokens: int, pairs: int
    ) -> None:
        """Answer `pairs` times over one worker and over two in each turn; `paths` of both."""
        self.name = name
        self.answers: list[list[int]] = []
        self._cluster = cluster
        self._alone, self._chain = paths
        self._tokens = tokens
        self._pairs = pairs

    async def turn(self, number: int) -> float:
        """See `Side`."""
        first = (number + 1) * self._pairs
        added = median([await self._added(seed) for seed in range(first, first + self._pairs)])
        disturbed = number != WARM_UP and added <= 0
        check(not disturbed, "the chain of two is not slower than one worker: the machine was disturbed")
        return added

    async def _added(self, seed: int) -> float:
        one, _ = await decode(self._cluster, self._alone, self._tokens, seed)
        two, answer = await decode(self._cluster, self._chain, self._tokens, seed)
        self.answers.append(answer)
        return (two - one) / HOPS

    def cpu_seconds(self) -> float:
        """See `Measured`."""
        return sum(worker.cpu_seconds() for worker in self._cluster.workers.values())


@asynccontextmanager
async def _hopping(build: Build, zoo: Path, tokens: int, pairs: int) -> AsyncIterator[Hopping]:
    near, far = two_cores()
    async with local_cluster(zoo, transport="tcp", build=build, engine_prefix_sharing="off") as cluster:
        yield Hopping(build.name, cluster, await start_workers(cluster, near, far), tokens, pairs)


def _same_tokens(ours: Hopping, base: Hopping) -> str:
    check(ours.answers == base.answers, "the builds answer otherwise than each other")
    return f"{len(ours.answers)} answers equal the base's"


@asynccontextmanager
async def open_hop(builds: Builds, scale: Scale, say: Say) -> AsyncIterator[Sides]:
    """Three workers of each build, one alone and two in a chain."""
    del say
    model = tiny_model()
    zoo = make_zoo(ZOO, {"base": model})
    tokens, pairs = (40, 4) if scale.quick else (HOP_TOKENS, HOP_PAIRS)
    text = (
        f"{model.name}, batch 1, tcp, each worker on one core: (median time of a token over two workers - at "
        f"one) / {HOPS} hops, the median of {HOP_PAIRS} pairs of answers of {HOP_TOKENS} tokens"
    )
    with pinned_to(two_cores()[1]):
        open_one = partial(_hopping, zoo=zoo, tokens=tokens, pairs=pairs)
        async with _both(builds, open_one, text, _same_tokens) as sides:
            yield sides


class Routing:
    """A router on one core before a worker without a model; samples are requests per second."""

    def __init__(self, name: str, router: Process, seconds: float) -> None:
        """Send requests for `seconds` in each turn."""
        self.name = name
        self._router = router
        self._seconds = seconds

    async def turn(self, number: int) -> float:
        """See `Side`; every turn asks the same."""
        seconds = min(self._seconds, WARM_SECONDS) if number == WARM_UP else self._seconds
        rate, _ = await load(self._router, SEPARATE, seconds)
        return rate

    def cpu_seconds(self) -> float:
        """See `Measured`."""
        return self._router.cpu_seconds()


@asynccontextmanager
async def _routing(build: Build, zoo: Path, seconds: float) -> AsyncIterator[Routing]:
    near, far = two_cores()
    async with local_cluster(zoo, build=build) as cluster:
        await cluster.process("fake_worker", "fake", {far}, {}).start()
        router = await cluster.start_router({near}, own_cores="1")
        await cluster.until(lambda view: len(view.workers) == 1)
        yield Routing(build.name, router, seconds)


def _same_lengths(ours: Routing, base: Routing) -> str:
    del ours, base
    return "every answer whole and in order"  # `load` checks


@asynccontextmanager
async def open_router(builds: Builds, scale: Scale, say: Say) -> AsyncIterator[Sides]:
    """A router of each build, each with a worker without a model."""
    del say
    zoo = make_zoo(ZOO, {"base": base_model(quick=scale.quick)})
    seconds = 0.3 if scale.quick else ROUTER_SECONDS
    text = (
        f"{IN_FLIGHT} streams of {TOKENS} tokens in flight, each token in a message of its own; router on "
        f"one core, worker without a model on the other, {ROUTER_SECONDS:g} s a sample"
    )
    with pinned_to(two_cores()[1]):
        async with _both(builds, partial(_routing, zoo=zoo, seconds=seconds), text, _same_lengths) as sides:
            yield sides


@asynccontextmanager
async def _both(
    builds: Builds,
    open_one: Callable[[Build], AbstractAsyncContextManager[S]],
    text: str,
    same: Callable[[S, S], str],
) -> AsyncIterator[Sides]:
    async with open_one(builds[0]) as ours, open_one(builds[1]) as base:
        yield Sides(text, ours, base, lambda: same(ours, base))
    fresh_folder(ZOO)
