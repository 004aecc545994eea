"""The real endpoint during real traffic: what is scraped is what the answers said was used."""

from __future__ import annotations

import asyncio

import pytest

from blockserve.client.aio import AsyncClient
from blockserve.embedded.server import EmbeddedServer
from blockserve.embedded.settings import EmbeddedSettings
from blockserve.worker.limits import EngineConfig
from blockzoo.errors import VariantNotFoundError
from blockzoo.zoo import Zoo
from support.edge import async_test
from support.scrape import scrape
from support.variants import VariantFactory

ENGINE = EngineConfig(
    dtype="float32", num_threads=1, max_tokens_per_pass=70, kv_cache_bytes=16 << 20, kv_page_tokens=8
)
NAMES = ("base", "adapter", "tuned")


@pytest.fixture
def zoo(factory: VariantFactory, family_zoo: Zoo) -> Zoo:
    family_zoo.register(factory.checkpoint("llama-gqa-tied").path, name="unused")
    return family_zoo


@async_test
async def test_counts_are_those_of_the_answers(zoo: Zoo) -> None:
    config = EmbeddedSettings.load(
        zoo=zoo.url, listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", drain_seconds=0.0, engine=ENGINE
    )
    server = EmbeddedServer(config)
    await server.start()
    async with AsyncClient(server.address, resume_attempts=0) as client:
        asks = [(name, 3 + 5 * i, 7 + i) for i, name in enumerate(NAMES * 4)]
        tasks = [
            asyncio.create_task(
                client.generate(
                    name, tuple(range(3, 3 + prompt)), temperature=0, max_tokens=tokens, ignore_eos=True
                ).result()
            )
            for name, prompt, tokens in asks
        ]
        during = [await scrape(server.metrics.address)]
        while not all(task.done() for task in tasks):
            during.append(await scrape(server.metrics.address))
        answers = [await task for task in tasks]
        with pytest.raises(VariantNotFoundError):
            await client.generate("nobody", "x").result()
        chunks = aiter(client.generate("tuned", "x", max_tokens=400, ignore_eos=True))
        await anext(chunks)
        streaming = await scrape(server.metrics.address)
        await chunks.aclose()
        while (await client.status()).kv_pages_used:
            await asyncio.sleep(0.001)
        await client.unload("tuned")
        after = await scrape(server.metrics.address)
        status = await client.status()
    await server.stop()

    usage = {
        name: [a.finish.usage for a, ask in zip(answers, asks, strict=True) if ask[0] == name]
        for name in NAMES
    }
    for name in ("base", "adapter"):
        used = usage[name]
        prompt, output = sum(u.prompt_tokens for u in used), sum(u.completion_tokens for u in used)
        assert after.by("vllm:prompt_tokens_total", "model_name")[name] == prompt
        assert after.by("vllm:generation_tokens_total", "model_name")[name] == output
        assert after.by("vllm:inter_token_latency_seconds_count", "model_name")[name] == output - len(used)
        for histogram in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
            assert after.by(f"vllm:{histogram}_seconds_count", "model_name")[name] == len(used)
        seconds = after.by("vllm:time_to_first_token_seconds_sum", "model_name")[name]
        told = sum(a.finish.time_to_first_token for a in answers if a.info.model == name)
        assert seconds == pytest.approx(told, abs=0.05 * len(used))
        assert after.by("vllm:request_queue_time_seconds_sum", "model_name")[name] <= seconds
    ends = after.by("vllm:request_success_total", "finished_reason")
    assert ends == {"length": len(answers), "abort": 1}
    assert after.by("blockzoo_requests_refused_total", "reason") == {"VARIANT_NOT_FOUND": 1}
    assert "nobody" not in after.by("vllm:generation_tokens_total", "model_name")

    # Counters never fall while requests run, and end where the answers do.
    totals = [sum(one.by("vllm:generation_tokens_total", "model_name").values()) for one in during]
    assert totals == sorted(totals)
    assert streaming.by("blockzoo_variant_requests", "model_name")["tuned"] == 1
    assert streaming.one("vllm:num_requests_running") + streaming.one("vllm:num_requests_waiting") == 1
    assert 0 < streaming.one("vllm:kv_cache_usage_perc") < 1
    assert after.one("vllm:kv_cache_usage_perc") == after.one("vllm:num_requests_running") == 0

    # What the engine says of itself.
    calls = {segment.segment_id: segment for segment in status.segments}
    assert after.by("blockzoo_segment_forward_calls_total", "segment") == {
        name: segment.forward_calls for name, segment in calls.items()
    }
    assert after.by("blockzoo_segment_batch_tokens_sum", "segment") == {
        name: segment.tokens for name, segment in calls.items()
    }
    assert after.by("blockzoo_segment_batch_chains_count", "segment") == {
        name: segment.forward_calls for name, segment in calls.items()
    }
    assert sum(streaming.by("blockzoo_segment_mixed_calls_total", "segment").values()) > 0
    assert (after.one("blockzoo_registered_variants"), streaming.one("blockzoo_loaded_chains")) == (4, 3)
    # `base` and `unused` are the same chain.
    assert set(streaming.by("blockzoo_variant_loaded", "model_name")) == {*NAMES, "unused"}
    assert set(after.by("blockzoo_variant_loaded", "model_name")) == {"base", "adapter", "unused"}
    assert (after.one("blockzoo_chain_loads_total"), after.one("blockzoo_chain_unloads_total")) == (3, 1)
    assert after.one("blockzoo_block_bytes") == status.block_bytes
