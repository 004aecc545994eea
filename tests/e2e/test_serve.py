"""Text to text through real zoo, engine, gRPC and client; the oracle is transformers and PEFT."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from blockserve.client.aio import AsyncClient
from blockserve.client.blocking import Client
from blockserve.client.inference import continued
from blockserve.common.api.calls import GenerateCall
from blockserve.common.api.tokens import FinishReason
from blockserve.common.errors import UnregisteredRefusedError
from blockserve.embedded.server import EmbeddedServer
from blockserve.embedded.settings import EmbeddedSettings
from blockserve.worker.limits import EngineConfig
from blockzoo.errors import CorruptBlobError
from blockzoo.layout import blob_key
from blockzoo.zoo import Zoo
from support.edge import async_test, until
from support.variants import Variant, VariantFactory
from support.zoo_faults import flip

NUM_TOKENS = 24
PROMPT = "Every tenant sends requests"
CHAT = [{"role": "user", "content": "Where there is a will?"}]
ENGINE = EngineConfig(
    dtype="float32", num_threads=1, max_tokens_per_pass=70, kv_cache_bytes=16 << 20, kv_page_tokens=8
)


@dataclass(frozen=True)
class Made:
    """Three variants that share most of their blocks, and who knows what they answer."""

    factory: VariantFactory
    base: Variant
    adapter: Variant
    tuned: Variant

    @property
    def all(self) -> tuple[Variant, ...]:
        """Base first."""
        return self.base, self.adapter, self.tuned

    def tokenizer(self) -> Any:
        """The base's, in transformers."""
        return AutoTokenizer.from_pretrained(self.base.path)


@pytest.fixture(scope="module")
def made(factory: VariantFactory) -> Made:
    base = factory.checkpoint("llama-gqa-tied")
    return Made(factory, base, factory.adapter(base, "patterns"), factory.top_quarter(base))


@pytest.fixture
def zoo(family_zoo: Zoo) -> Zoo:
    return family_zoo


@dataclass
class Served:
    """A running server over a real zoo."""

    server: EmbeddedServer
    client: AsyncClient

    async def kv_is_free(self) -> None:
        """Return once no KV page is in use."""
        while (await self.client.status()).kv_pages_used:
            await asyncio.sleep(0.001)


@asynccontextmanager
async def served(zoo: Zoo, **settings: Any) -> AsyncIterator[Served]:
    config = EmbeddedSettings.load(
        **{
            "zoo": zoo.url,
            "listen": "127.0.0.1:0",
            "metrics_listen": "off",
            "drain_seconds": 0.0,
            "engine": ENGINE,
            **settings,
        }
    )
    server = EmbeddedServer(config)
    await server.start()
    try:
        async with AsyncClient(server.address, resume_attempts=0) as client:
            yield Served(server, client)
    finally:
        await server.stop()


def expected(made: Made, variant: Variant, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """Greedy tokens by the oracle, up to the first end token."""
    (tokens,) = made.factory.oracle(variant).greedy([prompt], NUM_TOKENS)
    return tokens[: tokens.index(2) + 1] if 2 in tokens else tokens


@async_test
async def test_texts_of_all_variants_at_once_are_those_of_the_oracle(made: Made, zoo: Zoo) -> None:
    tokenizer = made.tokenizer()
    prompt = tuple(tokenizer(PROMPT)["input_ids"])
    async with served(zoo, preload=("all",)) as rig:
        names = ["base", "adapter", "tuned"] * 3
        answers = await asyncio.gather(
            *(
                rig.client.generate(name, PROMPT, temperature=0, max_tokens=NUM_TOKENS).result()
                for name in names
            )
        )
        status = await rig.client.status()
        for name, answer in zip(names, answers, strict=True):
            variant = made.all[names.index(name)]
            tokens = expected(made, variant, prompt)
            assert answer.token_ids == tokens
            assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)
            assert answer.info.ref == f"{name}@1"
            assert answer.finish.usage.prompt_tokens == len(prompt)
    assert len({answer.token_ids for answer in answers}) == 3
    assert len(status.chains) == 3
    assert sum(segment.mixed_calls for segment in status.segments) > 0
    assert max(segment.largest_batch_chains for segment in status.segments) == 3


@async_test
async def test_a_conversation_is_what_transformers_would_have_made_of_it(made: Made, zoo: Zoo) -> None:
    tokenizer = made.tokenizer()
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    prompt = tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    async with served(zoo) as rig:
        tokenized = await rig.client.tokenize("adapter", CHAT)
        assert (tokenized.text, tokenized.token_ids) == (rendered, prompt)
        answer = await rig.client.chat("adapter", CHAT, temperature=0, max_tokens=NUM_TOKENS).result()
        assert answer.token_ids == expected(made, made.adapter, prompt)


@async_test
async def test_an_adapter_named_by_its_folder_answers_as_the_oracle_says(made: Made, zoo: Zoo) -> None:
    prompt = tuple(made.tokenizer()(PROMPT)["input_ids"])
    named = f"base+path:{made.adapter.path}"
    options: dict[str, Any] = {"temperature": 0, "max_tokens": NUM_TOKENS}
    async with served(zoo, allow_unregistered=(str(Path(made.adapter.path).parent),)) as rig:
        answers = await asyncio.gather(
            *(rig.client.generate(named, PROMPT, **options).result() for _ in range(3))
        )
        again = await rig.client.generate(answers[0].info.ref, PROMPT, **options).result()
    for answer in (*answers, again):
        assert answer.token_ids == expected(made, made.adapter, prompt)
        assert answer.info.ref == answers[0].info.ref
        assert answer.info.ref.startswith("unregistered.")
    async with served(zoo) as rig:
        with pytest.raises(UnregisteredRefusedError) as refused:
            await rig.client.generate(named, PROMPT, **options).result()
    assert "--allow-unregistered" in refused.value.hint


@async_test
async def test_log_probabilities_are_those_of_the_oracle(made: Made, zoo: Zoo) -> None:
    prompt = tuple(made.tokenizer()(PROMPT)["input_ids"])
    async with served(zoo) as rig:
        answer = await rig.client.generate(
            "tuned", prompt, temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=True, ignore_eos=True
        ).result()
    sequence = (*prompt, *answer.token_ids)
    (logits,) = made.factory.oracle(made.tuned).logits([sequence])
    reference = torch.log_softmax(logits.float(), dim=-1)
    ours = [*answer.prompt_logprobs, *answer.logprobs]
    assert [position.token_id for position in ours] == list(sequence[1:])
    for i, position in enumerate(ours):
        assert position.logprob == pytest.approx(reference[i, sequence[i + 1]].item(), abs=1e-3)
    for i, position in enumerate(answer.logprobs, start=len(prompt) - 1):
        best = reference[i].topk(3)
        assert [token for token, _ in position.top] == best.indices.tolist()
        assert [value for _, value in position.top] == pytest.approx(best.values.tolist(), abs=1e-3)


@async_test
async def test_a_sampled_answer_can_be_had_again_and_gone_on_with(zoo: Zoo) -> None:
    async with served(zoo) as rig:
        options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True}
        first = await rig.client.generate("adapter", PROMPT, **options).result()
        others = [rig.client.generate("base", f"{i} other", **options).result() for i in range(6)]
        seeded = rig.client.generate("adapter", PROMPT, seed=first.info.seed, **options).result()
        again, *_ = await asyncio.gather(seeded, *others)
        assert again.token_ids == first.token_ids
        assert again.text == first.text

        chunks = aiter(rig.client.generate("adapter", PROMPT, seed=first.info.seed, **options))
        head = [await anext(chunks) for _ in range(3)]
        await chunks.aclose()
        call = GenerateCall(first.request_id, "adapter", PROMPT)
        for chunk in head:
            call = continued(call, chunk)
        assert call.resume_from == sum(len(chunk.token_ids) for chunk in head)
        rest = [chunk async for chunk in resumed(rig.client, call, options)]
        text = "".join(chunk.text for chunk in (*head, *rest))
        tokens = tuple(token for chunk in (*head, *rest) for token in chunk.token_ids)
        assert (tokens, text) == (first.token_ids, first.text)


def resumed(client: AsyncClient, call: GenerateCall, options: dict[str, Any]) -> AsyncIterator[Any]:
    from dataclasses import replace

    from blockserve.common.api.calls import StoppingWishes

    sampling = replace(call.sampling, temperature=options["temperature"])
    stopping = StoppingWishes(max_tokens=options["max_tokens"], ignore_eos=True)
    return client._inference.stream(replace(call, sampling=sampling, stopping=stopping), None)


@async_test
async def test_a_stop_string_ends_the_answer(made: Made, zoo: Zoo) -> None:
    async with served(zoo) as rig:
        whole = await rig.client.generate(
            "base", PROMPT, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True
        ).result()
        stop = whole.text[6:9]
        cut = await rig.client.generate(
            "base", PROMPT, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, stop=stop
        ).result()
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert (cut.finish.reason, cut.finish.matched) == (FinishReason.STOP, stop)
        assert len(cut.token_ids) < len(whole.token_ids)
        await rig.kv_is_free()


@async_test
async def test_a_client_gone_mid_stream_leaves_no_page_in_use(zoo: Zoo) -> None:
    async with served(zoo) as rig:
        chunks = aiter(rig.client.generate("base", PROMPT, max_tokens=400, ignore_eos=True))
        await anext(chunks)
        assert (await rig.client.status()).kv_pages_used > 0
        await chunks.aclose()
        await rig.kv_is_free()
        assert (await rig.client.status()).running_requests == 0
        assert (await rig.client.generate("base", PROMPT, max_tokens=2, ignore_eos=True).result()).token_ids


@async_test
async def test_registering_again_reaches_new_requests_while_old_ones_keep_their_version(
    made: Made, zoo: Zoo
) -> None:
    async with served(zoo) as rig:
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
        whole = await rig.client.generate("base", PROMPT, **options).result()
        chunks = aiter(rig.client.generate("base", PROMPT, **options))
        head = await anext(chunks)
        await asyncio.to_thread(zoo.register, made.tuned.path, name="base")
        new = await rig.client.generate("base", PROMPT, **options).result()
        rest = [chunk async for chunk in chunks]
        assert new.info.version == 2
        assert new.token_ids != whole.token_ids
        assert tuple(token for chunk in (head, *rest) for token in chunk.token_ids) == whole.token_ids
        old = await rig.client.generate("base@1", PROMPT, **options).result()
        assert old.token_ids == whole.token_ids


@async_test
async def test_unloading_and_loading_again_changes_no_token(zoo: Zoo) -> None:
    async with served(zoo) as rig:
        options: dict[str, Any] = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        before = await rig.client.generate("tuned", PROMPT, **options).result()
        await rig.client.unload("tuned")
        assert not (await rig.client.model("tuned")).loaded
        after = await rig.client.generate("tuned", PROMPT, **options).result()
        assert before.token_ids == after.token_ids


@async_test
async def test_a_damaged_block_is_refused_by_name_and_others_keep_serving(zoo: Zoo) -> None:
    shared = {blob for name in ("base", "adapter") for blob in blobs(zoo, name)}
    victim = sorted(blobs(zoo, "tuned") - shared)[0]
    flip(zoo.store, blob_key(victim), -1)
    async with served(zoo, preload=("all",)) as rig:
        with pytest.raises(CorruptBlobError) as caught:
            await rig.client.generate("tuned", PROMPT, max_tokens=2).result()
        assert victim in (*caught.value.metadata.values(), str(caught.value))
        for name in ("base", "adapter"):
            answer = await rig.client.generate(name, PROMPT, max_tokens=2, ignore_eos=True).result()
            assert len(answer.token_ids) == 2


def blobs(zoo: Zoo, name: str) -> set[str]:
    """Ids of the tensor blobs of a variant's base blocks."""
    links = zoo.chain(zoo.resolve(name).chain).links
    return {
        blob for link in links for tensor in zoo.block(link.base).tensors.values() for blob in tensor.blobs
    }


@async_test
async def test_health_follows_the_real_engine(zoo: Zoo) -> None:
    async with served(zoo, health_seconds=0.005) as rig:
        health = rig.server._host.health
        await until(lambda: health.is_serving)
        await rig.client.generate("base", PROMPT, max_tokens=50, ignore_eos=True).result()
        assert health.is_serving


def test_a_server_process_from_start_to_first_token(zoo: Zoo, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s.sock"
    environment = {
        **os.environ,
        "BLOCKZOO_ZOO": zoo.url,
        "BLOCKZOO_LISTEN": address,
        "BLOCKZOO_PRELOAD": '["all"]',
        "BLOCKZOO_LOG_LEVEL": "debug",
        "BLOCKZOO_ENGINE_NUM_THREADS": "1",
        "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(16 << 20),
    }
    command = [sys.executable, "-m", "blockserve.embedded"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            with Client(address, resume_attempts=100) as client:
                answer = client.generate("base", PROMPT, max_tokens=3, ignore_eos=True).result()
                assert len(answer.token_ids) == 3
            assert server.stderr is not None
            # A request may be answered before the last variant is preloaded, and the timeline told.
            head = ""
            while "ready address=" not in head:
                head += server.stderr.readline()
            server.terminate()
            tail = server.stderr.read()
            server.wait(60)
        finally:
            server.kill()
    assert server.returncode == 0
    log = head + tail
    stages = dict(re.findall(r"(\w+)=([\d.]+)-", log.partition("timeline: ")[2].partition("\n")[0]))
    assert float(stages["import_engine"]) <= float(stages["engine"]) <= float(stages["preload"])
    assert "outcome=finished" in log
    assert PROMPT not in log
