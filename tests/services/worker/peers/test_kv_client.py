"""Keys and values for a run that other workers executed in other parts, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.common.api.cluster import ChainSpan, PathStep, Run
from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.common.errors import WireError
from blockserve.worker.peers.kv_client import BATCH_PAGES
from blockserve.worker.peers.kv_transfer import KvPart, PrefixRef
from blockserve.worker.servicer import WorkerServicer
from support.tiny import SMALL, TinyZoo
from support.workers import Workers, running_workers

PROMPT = tuple(range(3, 3 + 8 * 13 + 5))
NUM_PAGES = len(PROMPT) // SMALL.kv_page_tokens
NUM_TOKENS = 6
assert NUM_PAGES % BATCH_PAGES, "the last batch is not full"


class OldWorker(WorkerServicer):
    """One of before there were parts: it does not know the fields that say which."""

    async def PullKv(self, request: Any, context: Any) -> Any:
        del request.parts[:]
        return await super().PullKv(request, context)

    async def ExportKv(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.ExportKvResponse]:
        request.part_first = request.part_end = 0
        async for page in super().ExportKv(request, context):
            yield page


class DamagedWorker(WorkerServicer):
    """Its memory fails behind the first batch."""

    async def ExportKv(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.ExportKvResponse]:
        async for page in super().ExportKv(request, context):
            if page.place == BATCH_PAGES + 1:
                page.keys = page.keys[:-1] + bytes([page.keys[-1] ^ 1])
            yield page


def run(
    tiny: TinyZoo,
    folder: Path,
    work: Callable[[Workers], Awaitable[None]],
    servicers: Mapping[str, type[WorkerServicer]] | None = None,
) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120), running_workers(tiny, folder, "abc", servicers) as workers:
            await work(workers)

    asyncio.run(bounded())


def prefix(tiny: TinyZoo, first: int, end: int, tokens: tuple[int, ...] = PROMPT) -> PrefixRef:
    return PrefixRef(ChainSpan(tiny.chains["all"], Run(first, end)), "tenant", tokens)


def length(tiny: TinyZoo) -> int:
    return len(tiny.zoo.chain(tiny.chains["all"]).links)


async def execute(
    workers: Workers, *path: PathStep, name: str = "first", prompt: tuple[int, ...] = PROMPT
) -> tuple[list[int], int]:
    """The answer along a path, and how many tokens of the prompt were cached."""
    chain = workers.tiny.chains["all"]
    await workers.load(chain, path)
    greedy = SamplingParams(temperature=0.0)
    request = EngineRequest(name, chain, prompt, greedy, NUM_TOKENS, cache_salt="tenant", path=path)
    events = await workers.run(request)
    return [event.token_id for event in events], events[0].cached_prompt_tokens


async def keys_of(
    workers: Workers, name: str, first: int, end: int, layers: Run | None = None
) -> torch.Tensor:
    """Cached keys and values of the prompt's pages, [2, pages, layers, page_tokens, kv_heads, head_dim]."""
    pages = await workers.engine(name).export_kv(prefix(workers.tiny, first, end), 0, NUM_PAGES, layers)
    assert len(pages) == NUM_PAGES
    return torch.stack([torch.stack([one.keys for one in pages]), torch.stack([one.values for one in pages])])


def test_layers_of_two_workers_become_the_pages_of_one_run(tiny: TinyZoo, tmp_path: Path) -> None:
    """a 0-2 and b 2-, then c 0-3 and b 3-: c has layers of both, b has its own under another run."""

    async def work(workers: Workers) -> None:
        end = length(tiny)
        old_a, old_b = workers.step("a", 0, 2), workers.step("b", 2, end)
        expected, cached = await execute(workers, old_a, old_b)
        assert cached == 0
        parts = [KvPart(old_a, Run(1, 2)), KvPart(old_b, Run(2, 3))]
        pulled = await workers.services["c"].pull_kv(prefix(tiny, 0, 3), parts)
        layer_bytes = workers.engine("c").report().kv_token_bytes * SMALL.kv_page_tokens
        assert (pulled.pages, pulled.num_bytes) == (NUM_PAGES, NUM_PAGES * 2 * layer_bytes)
        before = workers.engine("b").report().kv_pages_cached
        own = await workers.services["b"].pull_kv(prefix(tiny, 3, end), [KvPart(old_b, Run(3, end - 1))])
        assert (own.pages, own.num_bytes) == (NUM_PAGES, 0)
        # Layers that are there under another run take no second page.
        assert workers.engine("b").report().kv_pages_cached == before > 0

        both = torch.cat(
            [await keys_of(workers, "a", 0, 2), await keys_of(workers, "b", 2, end, Run(2, 3))], dim=2
        )
        assert torch.equal(await keys_of(workers, "c", 0, 3), both)
        assert torch.equal(
            await keys_of(workers, "b", 3, end), await keys_of(workers, "b", 2, end, Run(3, end - 1))
        )
        answer, cached = await execute(
            workers, workers.step("c", 0, 3), workers.step("b", 3, end), name="second"
        )
        assert (answer, cached) == (expected, NUM_PAGES * SMALL.kv_page_tokens)

    run(tiny, tmp_path, work)


def test_a_prefix_is_cached_as_far_as_every_part_of_it(tiny: TinyZoo, tmp_path: Path) -> None:
    """b has executed all of the prompt, a only the beginning of it, and c nothing at all."""

    async def work(workers: Workers) -> None:
        end = length(tiny)
        short = PROMPT[: 3 * SMALL.kv_page_tokens + 1]
        await execute(workers, workers.step("a", 0, 2), workers.step("c", 2, end), prompt=short)
        await execute(workers, workers.step("b", 0, end))
        parts = [KvPart(workers.step("a", 0, 2), Run(1, 2)), KvPart(workers.step("b", 0, end), Run(2, 3))]
        pulled = await workers.services["c"].pull_kv(prefix(tiny, 0, 3), parts)
        assert pulled.pages == 3
        assert len(await workers.engine("c").export_kv(prefix(tiny, 0, 3), 0, NUM_PAGES)) == 3
        nothing = [KvPart(workers.step("a", 0, 4), Run(1, 2)), KvPart(workers.step("b", 0, end), Run(2, 4))]
        pulled = await workers.services["c"].pull_kv(prefix(tiny, 0, 4), nothing)
        assert pulled.pages == 0
        assert await workers.engine("c").export_kv(prefix(tiny, 0, 4), 0, NUM_PAGES) == []

    run(tiny, tmp_path, work)


@pytest.mark.parametrize(
    ("servicer", "pages", "message"),
    [(OldWorker, 0, "other layers"), (DamagedWorker, BATCH_PAGES, "damaged")],
)
def test_a_page_of_which_a_part_is_wrong_is_not_kept(
    tiny: TinyZoo, tmp_path: Path, servicer: type[WorkerServicer], pages: int, message: str
) -> None:
    async def work(workers: Workers) -> None:
        end = length(tiny)
        old_a, old_b = workers.step("a", 0, 2), workers.step("b", 2, end)
        expected, _ = await execute(workers, old_a, old_b)
        parts = [KvPart(old_a, Run(1, 2)), KvPart(old_b, Run(2, 3))]
        with pytest.raises(WireError, match=message):
            await workers.services["c"].pull_kv(prefix(tiny, 0, 3), parts)
        assert len(await workers.engine("c").export_kv(prefix(tiny, 0, 3), 0, NUM_PAGES)) == pages
        answer, _ = await execute(workers, workers.step("c", 0, 3), workers.step("b", 3, end), name="second")
        assert answer == expected

    run(tiny, tmp_path, work, {"b": servicer})


def test_a_worker_that_does_not_know_parts_fetches_nothing(tiny: TinyZoo, tmp_path: Path) -> None:
    async def work(workers: Workers) -> None:
        end = length(tiny)
        await execute(workers, workers.step("a", 0, end))
        message = worker_pb2.PullKvRequest(
            prefix=worker_pb2.PrefixRef(
                chain_digest=tiny.chains["all"], first=0, end=3, cache_salt="tenant", tokens=PROMPT
            )
        )
        source = {"source_worker_id": "a", "source_address": workers.step("a", 0, end).address}
        message.parts.add(first=1, end=3, source_first=0, source_end=end, **source)
        async with grpc.aio.insecure_channel(workers.step("c", 0, 3).address) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await worker_pb2_grpc.WorkerServiceStub(channel).PullKv(message, timeout=30)
        assert await workers.engine("c").export_kv(prefix(tiny, 0, 3), 0, NUM_PAGES) == []
        async with grpc.aio.insecure_channel(workers.step("b", 0, 3).address) as channel:
            pulled = await worker_pb2_grpc.WorkerServiceStub(channel).PullKv(message, timeout=30)
        assert pulled.tokens == NUM_PAGES * SMALL.kv_page_tokens

    run(tiny, tmp_path, work, {"c": OldWorker})


def test_parts_that_are_not_the_run_are_refused(tiny: TinyZoo, tmp_path: Path) -> None:
    async def work(workers: Workers) -> None:
        end = length(tiny)
        whole = workers.step("a", 0, end)
        await execute(workers, whole)
        for runs in (
            [Run(1, 2)],
            [Run(1, 2), Run(3, 4)],
            [Run(2, 3), Run(1, 2)],
            [Run(1, 2), Run(2, 3), Run(3, 4)],
            [Run(0, 3)],
            [None, None],
        ):
            with pytest.raises(WireError):
                await workers.services["c"].pull_kv(prefix(tiny, 0, 3), [KvPart(whole, one) for one in runs])
        with pytest.raises(WireError, match="not the layers"):
            await workers.services["c"].pull_kv(
                prefix(tiny, 0, 3), [KvPart(workers.step("a", 0, 2), Run(1, 3))]
            )
        with pytest.raises(WireError, match="not all layers"):
            await workers.engine("a").export_kv(prefix(tiny, 0, end), 0, 1, Run(1, end))
        assert await workers.engine("c").export_kv(prefix(tiny, 0, 3), 0, NUM_PAGES) == []

    run(tiny, tmp_path, work)
