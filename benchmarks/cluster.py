"""A cluster of real processes for benchmarks, each on the cores it is given; and small tools around it."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from builds import THIS, Build
from harness import CACHE, Row, check
from served import MODEL, START_SECONDS, fresh_folder
from transformers import LlamaConfig, LlamaForCausalLM

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.client.aio import AsyncClient
from blockserve.common.api.cluster import ClusterView, PathStep, Run, WorkerId
from blockserve.common.process.redis_child import RedisChild
from blockserve.common.rpc.channel import Credentials, open_channel
from blockserve.common.state.opening import open_store
from blockserve.common.state.settings import StateConfig
from blockzoo.manifest import ChainManifest
from blockzoo.zoo import Zoo

Transport = Literal["tcp", "unix"]
LOOK_SECONDS = 0.02
"""How often it is looked whether something has come about."""


def two_cores() -> tuple[int, int]:
    """The cores that measurements are pinned to; the same one twice where there is no second."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[0], cores[1 % len(cores)]


@contextmanager
def pinned_to(core: int) -> Iterator[None]:
    """This process runs on one core, with the threads that it has already, and then where it ran before."""
    before = os.sched_getaffinity(0)
    _move_threads({core})
    try:
        yield
    finally:
        _move_threads(before)


def _move_threads(cores: Collection[int]) -> None:
    for task in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # ended meanwhile
            os.sched_setaffinity(int(task.name), cores)


@dataclass(eq=False)
class Process:
    """A process of ours that prints `ready ADDRESS` when it takes calls.

    Attributes:
        command: after the interpreter.
        cores: where it may run.
        environment: what differs from ours.
        log: gets its standard error.
        build: the code that it runs.
        address: where it listens; known after `start`.
    """

    command: Sequence[str]
    cores: Collection[int]
    environment: dict[str, str]
    log: Path
    build: Build = THIS
    address: str = ""
    _popen: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    async def start(self) -> None:
        """Start it and wait until it is ready (CheckFailedError)."""
        pin = ["taskset", "-c", ",".join(map(str, sorted(self.cores)))]
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                [*pin, str(self.build.python), *self.command],
                env={**self.build.environment(), **self.environment},
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.build.root,
            )
        stdout = self._popen.stdout
        assert stdout is not None
        async with asyncio.timeout(START_SECONDS):
            line = (await asyncio.to_thread(stdout.readline)).decode()
        check(line.startswith("ready "), f"{self.command} did not start: {self.log.read_text()[-2000:]}")
        self.address = line.split()[1]

    @property
    def pid(self) -> int:
        """Of the process itself."""
        assert self._popen is not None
        return self._popen.pid

    def send(self, number: signal.Signals) -> None:
        """Signal it."""
        os.kill(self.pid, number)

    def cpu_seconds(self) -> float:
        """Processor time it has used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """End it at once; harmless when it has ended or never started."""
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait()
            if self._popen.stdout is not None:
                self._popen.stdout.close()


class LocalCluster:
    """Workers, a router and the server of the shared state, over one zoo, on this machine.

    Attributes:
        zoo: what is served.
        workers: by name.
        router: after `start_router`.
        store: the shared state.
    """

    def __init__(
        self,
        zoo: Zoo,
        path: Path,
        *,
        transport: Transport = "unix",
        build: Build = THIS,
        **settings: str,
    ) -> None:
        """Start the shared state's server.

        Args:
            zoo: what is served.
            path: where it is.
            transport: what the processes listen on.
            build: the code of workers and router; the benchmark's own programs run this tree's.
            settings: environment variables of all processes, without `BLOCKZOO_`, in lower case.
        """
        self.zoo = zoo
        # Short, because paths of sockets may have 107 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="blockzoo-bench-"))
        self._transport = transport
        self._build = build
        self._redis = RedisChild(socket_path=self._folder / "state.sock")
        self._common = _environment(
            {"zoo": str(path), "state_url": self._redis.url, "log_level": "warning", **settings}
        )
        self.store = open_store(StateConfig(url=self._redis.url))
        self.workers: dict[str, Process] = {}
        self.router: Process | None = None
        self._processes: list[Process] = []

    async def start_worker(self, name: str, cores: Collection[int], **settings: str) -> Process:
        """Start a worker, or start it again."""
        process = self.process("worker", name, cores, {"name": name, **settings})
        self.workers[name] = process
        await process.start()
        return process

    async def start_router(self, cores: Collection[int], **settings: str) -> Process:
        """Start the router."""
        self.router = self.process("router", "router", cores, settings)
        await self.router.start()
        return self.router

    def process(self, service: str, name: str, cores: Collection[int], settings: dict[str, str]) -> Process:
        """A process of the cluster, not started; it ends with the cluster."""
        socket = self._folder / f"{name}.sock"
        socket.unlink(missing_ok=True)  # one that was killed leaves it behind
        listen = f"unix:{socket}" if self._transport == "unix" else "127.0.0.1:0"
        program = Path(__file__).parent / f"{service}.py"
        own = program.exists()
        command = [str(program)] if own else ["-m", f"blockserve.{service}"]
        build = THIS if own else self._build
        environment = {**self._common, **_environment({"listen": listen, **settings})}
        made = Process(command, cores, environment, self._folder / f"{name}.log", build)
        self._processes.append(made)
        return made

    async def load(self, name: str, model: str, run: Run) -> PathStep:
        """Have a worker hold a run of a variant's chain, and wait until everybody can know."""
        process, chain = self.workers[name], self.zoo.resolve(model).chain
        async with open_channel(process.address, Credentials()) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            await stub.LoadSpan(
                worker_pb2.LoadSpanRequest(chain_digest=chain, first=run.first, end=run.end, pinned=True),
                timeout=START_SECONDS,
            )
            described = await stub.Describe(worker_pb2.DescribeRequest())
        worker = WorkerId(described.worker_id)
        await self.until(lambda view: worker in view.workers and bool(view.workers[worker].segments))
        return PathStep(worker, process.address, run)

    async def until(self, holds: Any) -> None:
        """Wait until the shared state looks as it should."""
        async with asyncio.timeout(START_SECONDS):
            while not holds(await self.store.view()):
                await asyncio.sleep(LOOK_SECONDS)

    async def view(self) -> ClusterView:
        """The shared state."""
        return await self.store.view()

    def client(self) -> AsyncClient:
        """A client of the router."""
        assert self.router is not None
        return AsyncClient(self.router.address)

    async def close(self) -> None:
        """End every process that was started."""
        await self.store.close()
        for process in self._processes:
            process.kill()
        self._redis.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


@asynccontextmanager
async def local_cluster(path: Path, **options: Any) -> AsyncIterator[LocalCluster]:
    """A cluster over a zoo without processes yet, ended whatever happens; options as of `LocalCluster`."""
    made = LocalCluster(Zoo.open(path), path, **options)
    try:
        yield made
    finally:
        await made.close()


def _environment(settings: dict[str, str]) -> dict[str, str]:
    return {f"BLOCKZOO_{name.upper()}": value for name, value in settings.items()}


def halves(chain: ChainManifest, *, sampled: float = 1.0) -> tuple[Run, Run]:
    """A chain cut where both workers have about as much to compute: the head block weighs a few layers.

    The embedding is a look-up; the head block is a matrix product with the whole vocabulary.

    Args:
        chain: what to cut.
        sampled: share of all tokens that the head computes; of a prompt it computes the last one only.
    """
    layers = len(chain.links) - 2
    cut = 1 + int(layers + sampled * min(_head_layers(chain), layers // 2)) // 2
    return Run(0, cut), Run(cut, len(chain.links))


def _head_layers(chain: ChainManifest) -> int:
    """How many layers take as long as the head block, from the sizes of SmolLM2 and the like."""
    return 8 if chain.vocab_size > 10_000 else 0


def tiny_model(name: str = "tiny", *, hidden: int = 576, layers: int = 4, vocab: int = 512) -> Path:
    """A random bf16 checkpoint whose hidden states are as wide as SmolLM2's; made once."""
    folder = CACHE / "bench" / f"{name}-{hidden}-{layers}-{vocab}"
    if (folder / "model.safetensors").exists():
        return folder
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 192,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    partial = fresh_folder(f"{folder.name}.partial")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(partial)
    partial.rename(folder)
    return folder


def make_zoo(name: str, models: dict[str, Path]) -> Path:
    """A fresh zoo with models by name."""
    folder = fresh_folder(name)
    zoo = Zoo.open(folder, create=True)
    for model, path in models.items():
        zoo.register(path, name=model)
    return folder


def base_model(*, quick: bool) -> Path:
    """SmolLM2, or the tiny model."""
    return tiny_model() if quick else MODEL


def prompts(seed: int, count: int, num_tokens: int, vocab: int) -> list[tuple[int, ...]]:
    """Random prompts, no end tokens among them."""
    source = random.Random(seed)
    return [tuple(source.randrange(10, vocab) for _ in range(num_tokens)) for _ in range(count)]


async def answer(client: AsyncClient, model: str, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """A greedy answer of exactly so many tokens (CheckFailedError)."""
    stream = client.generate(model, prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    tokens = [token async for chunk in stream for token in chunk.token_ids]
    check(len(tokens) == num_tokens, f"an answer has {len(tokens)} of {num_tokens} tokens")
    return tokens


def row(program: str, name: str, case: str, unit: str, ours: list[float], **peer: Any) -> Row:
    """A row of a program's result."""
    return Row(
        id=name,
        case=case,
        unit=unit,
        command=f"python benchmarks/{program}.py",
        ours=ours,
        peer=peer.get("peer"),
        peer_name=peer.get("peer_name"),
    )
