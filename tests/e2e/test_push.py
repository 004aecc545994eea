"""A variant pushed to a server that is serving: its answers are those of the oracle, at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

from transformers import AutoTokenizer

from blockserve.client.aio import AsyncClient
from blockserve.client.zoo import RemoteZoo
from blockserve.embedded.server import EmbeddedServer
from blockserve.embedded.settings import EmbeddedSettings
from blockserve.worker.limits import EngineConfig
from support.edge import async_test
from support.variants import VariantFactory

NUM_TOKENS = 16
PROMPT = "Every tenant sends requests"
ENGINE = EngineConfig(dtype="float32", num_threads=1, kv_cache_bytes=16 << 20, kv_page_tokens=8)


@async_test
async def test_pushed_variants_answer_like_the_oracle(factory: VariantFactory, tmp_path: Path) -> None:
    base = factory.checkpoint("llama-gqa-tied")
    variants = {"base": base, "bot": factory.adapter(base, "patterns"), "legal": factory.top_quarter(base)}
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    prompt = tuple(tokenizer(PROMPT)["input_ids"])
    server = EmbeddedServer(
        EmbeddedSettings.load(
            zoo=str(tmp_path / "zoo"), create_zoo=True, listen="127.0.0.1:0", drain_seconds=0.0, engine=ENGINE
        )
    )
    await server.start()
    try:
        async with AsyncClient(server.address) as client:
            with RemoteZoo(server.address) as zoo:
                for name, variant in variants.items():
                    on = None if name == "base" else "base"
                    await asyncio.to_thread(zoo.register, variant.path, name=name, base=on)
                    answer = await client.generate(
                        name, PROMPT, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True
                    ).result()
                    (expected,) = factory.oracle(variant).greedy([prompt], NUM_TOKENS)
                    assert answer.token_ids == tuple(expected)
                assert (await asyncio.to_thread(zoo.verify)).ok
    finally:
        await server.stop()
