"""memory: how much a server grows by 1 base + 8 LoRA + 4 top-quarter variants, over their distinct bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness import RUNS, Benchmark, Row, check
from served import MODEL, Server, fresh_folder, random_adapters, run_client, serve, top_quarter_variants

from blockserve.client.blocking import AsyncClient
from blockzoo.manifest import BlobId
from blockzoo.zoo import Zoo

ADAPTERS, TUNED = 8, 4
PROMPT = "The capital of France is"


def run(say: Callable[[str], None]) -> list[Row]:
    """Start an empty and a full server in turns and compare what is resident."""
    folder = fresh_folder("memory-zoo")
    zoo = Zoo.open(folder, create=True)
    zoo.register(MODEL, name="base")
    for path in random_adapters(ADAPTERS):
        zoo.register(path, name=path.name, base="base")
    for path in top_quarter_variants(TUNED):
        zoo.register(path, name=path.name, base="base")
    names = [str(record.name) for record in zoo.variants()]
    check(len(names) == 1 + ADAPTERS + TUNED, "not every variant is registered")
    distinct = float(distinct_bytes(zoo))
    loaded: list[float] = []
    served: list[float] = []
    for number in range(RUNS):
        after_load, after_use = _growth(folder, names)
        loaded.append(after_load)
        served.append(after_use)
        say(f"run {number + 1}/{RUNS}: {after_load / 1e6:.0f} MB loaded, {after_use / 1e6:.0f} MB used")
    fresh_folder("memory-zoo")
    command = "python benchmarks/run.py --only memory"
    peer_name = "bytes of the distinct tensors"
    case = (
        f"SmolLM2 bf16 + {ADAPTERS} LoRA r16 (all linear modules) + {TUNED} with the top quarter changed: Rss"
    )
    return [
        Row(
            "memory-loaded",
            f"{case}, all loaded, over an empty server",
            "bytes",
            command,
            loaded,
            [distinct],
            peer_name,
        ),
        Row(
            "memory-served",
            f"{case}, after one request to each (touched KV pages included), over an empty server",
            "bytes",
            command,
            served,
            [distinct],
            peer_name,
        ),
    ]


def distinct_bytes(zoo: Zoo) -> int:
    """Decoded bytes of the tensor blobs that the chains of all variants use, each once."""
    sizes: dict[BlobId, int] = {}
    for record in zoo.variants():
        for link in zoo.chain(record.chain).links:
            for block in (link.base, *link.applied):
                for tensor in zoo.block(block).tensors.values():
                    for blob, shape in zip(tensor.blobs, tensor.chunk_shapes(), strict=True):
                        size = tensor.dtype.itemsize
                        for dim in shape:
                            size *= dim
                        sizes[blob] = size
    return sum(sizes.values())


def _growth(folder: Path, names: list[str]) -> tuple[float, float]:
    with serve(folder) as server:
        empty = run_client(server.address, lambda client: _resident(client, server))
    with serve(folder) as server:

        async def load(client: AsyncClient) -> float:
            for name in names:
                await client.load(name)
            return await _resident(client, server)

        async def use(client: AsyncClient) -> float:
            for name in names:
                answer = await client.generate(
                    name, PROMPT, temperature=0, max_tokens=4, ignore_eos=True
                ).result()
                check(len(answer.token_ids) == 4, f"{name} did not answer")
            return await _resident(client, server)

        loaded = run_client(server.address, load)
        used = run_client(server.address, use)
    return loaded - empty, used - empty


async def _resident(client: AsyncClient, server: Server) -> float:
    await client.status()  # answers only when the server is up, engine included
    return float(server.resident_bytes())


BENCHMARK = Benchmark(
    "memory", "resident growth for 13 variants over their distinct bytes", "at most 1.3", run
)
