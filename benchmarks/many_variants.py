"""many-variants: 17 variants under a cap on weights, over vLLM processes that are started on demand.

A base model, eight LoRA adapters of it and eight fully tuned checkpoints; requests choose among them after
Zipf's law and come from clients that each ask again as soon as they are answered. The cap holds less than
all checkpoints. Ours is one server whose blocks may take the cap. vLLM is a process for the base model
and all its adapters, and one for each tuned checkpoint; as many may live as the cap has room for weights, and
the one that was asked least recently ends for one that has to start. Their runtimes, caches and compiled code
are not counted against them, and what they compiled was compiled before.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

from cluster import answer, make_zoo, row
from harness import Row, check
from peers.engines import Child
from peers.turns import Options
from peers.vllm import vllm
from peers.workload import Request
from program import Bar, Program, Say, Scale
from served import MODEL, full_variants, random_adapters, serve

from blockserve.client.aio import AsyncClient
from blockzoo.zoo import Zoo

LORAS, TUNED = 8, 8
CLIENTS, REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 8, 32, 64, 64
ZIPF = 1.0
"""Exponent: the variant of rank r is asked for in proportion to 1 / r."""
CHECKPOINTS_IN_MEMORY = 4
"""What the cap has room for, of nine."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request: which variant, and the prompt."""

    variant: str
    folder: Path | None
    prompt: tuple[int, ...]


async def measure(scale: Scale, say: Say) -> list[Row]:
    """Both sides answer the same requests in turns."""
    loras, tuned = random_adapters(LORAS), full_variants(TUNED)
    checkpoint = (MODEL / "model.safetensors").stat().st_size
    cap = CHECKPOINTS_IN_MEMORY * checkpoint + sum(
        (folder / "adapter_model.safetensors").stat().st_size for folder in loras
    )
    count, output = (8, 4) if scale.quick else (REQUESTS, OUTPUT_TOKENS)
    variants: list[tuple[str, Path | None]] = [("base", None)]
    variants += [(folder.name, folder) for folder in (*loras, *tuned)]
    random.Random(0).shuffle(variants)  # which rank is of which kind
    ours: list[float] = []
    peer: list[float] = []
    path = _zoo(loras, tuned)
    options = ("--block-bytes", str(cap), "--prefix-sharing", "off")
    say(f"cap {cap / 2**20:.0f} MiB, checkpoints together {(1 + TUNED) * checkpoint / 2**20:.0f} MiB")
    peers = Options(runs=scale.runs, quick=scale.quick, say=say)
    with Processes(tuned, peers) as processes, serve(path, *options) as server:
        async with AsyncClient(server.address) as client:
            for number in range(scale.runs):
                wanted = _workload(number, count, variants)
                tokens = count * output
                seconds = await _in_turn(wanted, lambda one: _ask(client, one, output))
                ours.append(tokens / seconds)
                check(server.resident_bytes() > 0, "the server has gone")
                before = processes.starts
                seconds = await _in_turn(wanted, lambda one: processes.ask(one, output))
                peer.append(tokens / seconds)
                say(
                    f"run {number + 1}/{scale.runs}: {ours[-1]:.1f} tokens/s, "
                    f"vLLM {peer[-1]:.1f} tokens/s with {processes.starts - before} starts"
                )
    case = (
        f"base, {LORAS} LoRA, {TUNED} tuned; {count} requests of {CLIENTS} clients, Zipf {ZIPF:g}, "
        f"{PROMPT_TOKENS} in, {output} out, greedy, bf16; cap of {CHECKPOINTS_IN_MEMORY} of {1 + TUNED} "
        "checkpoints and the adapters"
    )
    name = f"{processes.name}, at most {CHECKPOINTS_IN_MEMORY} of {1 + TUNED} processes at a time"
    return [row("many_variants", "many-variants", case, "tokens/s", ours, peer=peer, peer_name=name)]


def _zoo(loras: Sequence[Path], tuned: Sequence[Path]) -> Path:
    folder = make_zoo("many-variants-zoo", {"base": MODEL, **{one.name: one for one in tuned}})
    zoo = Zoo.open(folder)
    for one in loras:
        zoo.register(one, name=one.name, base="base")
    return folder


def _workload(seed: int, count: int, variants: Sequence[tuple[str, Path | None]]) -> list[Wanted]:
    source = random.Random(1000 + seed)
    shares = [1 / (rank + 1) ** ZIPF for rank in range(len(variants))]
    return [
        Wanted(name, folder, tuple(source.randrange(10, 40_000) for _ in range(PROMPT_TOKENS)))
        for name, folder in source.choices(variants, shares, k=count)
    ]


async def _in_turn(wanted: Sequence[Wanted], ask: Callable[[Wanted], Awaitable[None]]) -> float:
    """Seconds until the clients have had all answers, each asking for the next as soon as it has one."""
    left = iter(wanted)

    async def client() -> None:
        for one in left:
            await ask(one)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return time.perf_counter() - started


async def _ask(client: AsyncClient, one: Wanted, output: int) -> None:
    await answer(client, one.variant, one.prompt, output)


@dataclass(eq=False, slots=True)
class Running:
    """A vLLM process that serves.

    Attributes:
        child: the process.
        ending: ends it.
        waiting: whoever waits for an answer, by number.
        receiving: takes answers.
    """

    child: Child
    ending: ExitStack
    waiting: dict[int, asyncio.Future[list[int]]] = field(default_factory=dict)
    receiving: asyncio.Task[None] | None = None

    async def ask(self, number: int, request: Request) -> list[int]:
        """The tokens of one answer."""
        self.waiting[number] = asyncio.get_running_loop().create_future()
        self.child.send(number, request)
        if self.receiving is None:
            self.receiving = asyncio.create_task(self._receive())
        return await self.waiting[number]

    async def _receive(self) -> None:
        while self.waiting:
            number, tokens = await asyncio.to_thread(self.child.receive)
            self.waiting.pop(number).set_result(tokens)
        self.receiving = None


class Processes:
    """vLLM processes, started when they are asked; whoever was asked least recently ends for another."""

    def __init__(self, tuned: Sequence[Path], options: Options) -> None:
        """None runs yet; `tuned` are the checkpoints that need a process of their own."""
        self._tuned = frozenset(tuned)
        self._options = options
        self._running: OrderedDict[Path, Running] = OrderedDict()
        self._claims: dict[Path, int] = {}
        self._changed = asyncio.Condition()
        self._starting: set[Path] = set()
        self._number = 0
        self.starts = 0
        self.name = "vLLM"

    def __enter__(self) -> Processes:
        """Nothing starts before it is asked."""
        return self

    def __exit__(self, *_: object) -> None:
        """End all."""
        for process in self._running.values():
            process.ending.close()

    async def ask(self, one: Wanted, output: int) -> None:
        """Have the variant's process answer, once it runs (CheckFailedError)."""
        model = one.folder if one.folder in self._tuned else MODEL
        assert model is not None
        self._claims[model] = self._claims.get(model, 0) + 1
        try:
            process = await self._claimed(model)
            self._number += 1
            adapter = None if one.folder == model else one.folder
            tokens = await process.ask(self._number, Request(one.variant, adapter, one.prompt, output))
            check(len(tokens) == output, f"vLLM answered {len(tokens)} of {output} tokens")
        finally:
            self._claims[model] -= 1
            async with self._changed:
                self._changed.notify_all()

    async def _claimed(self, model: Path) -> Running:
        """The model's process, which nobody ends while it is claimed; others go on while one starts."""
        async with self._changed:
            while model not in self._running:
                if model in self._starting or not self._has_room():
                    await self._changed.wait()
                    continue
                self._starting.add(model)
                self._changed.release()
                try:
                    started = await asyncio.to_thread(self._start, model)
                finally:
                    await self._changed.acquire()
                    self._starting.discard(model)
                    self._changed.notify_all()
                self._running[model] = started
            self._running.move_to_end(model)
            return self._running[model]

    def _has_room(self) -> bool:
        """Whether one more may run, after ending one that nobody claims if need be."""
        if len(self._running) + len(self._starting) < CHECKPOINTS_IN_MEMORY:
            return True
        idle = next((model for model in self._running if not self._claims.get(model)), None)
        if idle is None:
            return False
        self._running.pop(idle).ending.close()
        return True

    def _start(self, model: Path) -> Running:
        self.starts += 1
        ending = ExitStack()
        loras = LORAS if model == MODEL else 0
        child = ending.enter_context(vllm(self._options, model=model, loras=loras, kv_gib=1))
        child.wait_ready()
        child.begin_serving()
        self.name = child.name
        return Running(child, ending)


PROGRAM = Program(
    "many-variants",
    "tokens/s of 17 variants under a cap, over vLLM processes started on demand",
    measure,
    (Bar("many-variants", 5.0),),
)
BENCHMARK = PROGRAM.benchmark

if __name__ == "__main__":
    sys.exit(PROGRAM.main())
