"""Sampling in full through real zoo, engine, gRPC and client; the oracle is transformers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blockserve.client.aio import AsyncClient
from blockserve.client.generation import collect_choices
from blockserve.client.inference import continued
from blockserve.common.api.calls import GenerateCall, SamplingWishes, StoppingWishes
from blockserve.common.errors import KvCapacityError, SamplingError
from blockserve.embedded.server import EmbeddedServer
from blockserve.embedded.settings import EmbeddedSettings
from blockserve.worker.limits import EngineConfig
from blockzoo.zoo import Zoo
from support.edge import async_test
from support.oracle import Oracle
from support.variants import VariantFactory

NUM_TOKENS = 24
PROMPT = (11, 12, 13, 14, 11, 12)
ENGINE = EngineConfig(
    dtype="float32", num_threads=1, max_tokens_per_pass=70, kv_cache_bytes=16 << 20, kv_page_tokens=8
)


@pytest.fixture(scope="module")
def oracle(factory: VariantFactory) -> Oracle:
    return factory.oracle(factory.checkpoint("llama-gqa"))


@pytest.fixture
def zoo(factory: VariantFactory, tmp_path: Path) -> Zoo:
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(factory.checkpoint("llama-gqa").path, name="base")
    return zoo


@asynccontextmanager
async def served(zoo: Zoo, engine: EngineConfig = ENGINE) -> AsyncIterator[AsyncClient]:
    config = EmbeddedSettings.load(zoo=zoo.url, listen="127.0.0.1:0", drain_seconds=0.0, engine=engine)
    server = EmbeddedServer(config)
    await server.start()
    try:
        async with AsyncClient(server.address, resume_attempts=0) as client:
            yield client
    finally:
        await server.stop()


async def everything_is_free(client: AsyncClient) -> None:
    """Return once the engine has no request and no KV page is in use."""
    while True:
        status = await client.status()
        if not (status.kv_pages_used or status.running_requests or status.waiting_requests):
            return
        await asyncio.sleep(0.001)


@async_test
async def test_penalties_and_biases_are_those_of_transformers(zoo: Zoo, oracle: Oracle) -> None:
    (plain,) = oracle.greedy([PROMPT], NUM_TOKENS)
    often = plain[2]
    async with served(zoo) as client:
        for ours, theirs in (
            ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
            ({"logit_bias": {often: -100.0}}, {"sequence_bias": [[[often], -100.0]]}),
            (
                {"logit_bias": {often: 3.5, 40: 2.0}, "repetition_penalty": 1.2},
                {"sequence_bias": [[[often], 3.5], [[40], 2.0]], "repetition_penalty": 1.2},
            ),
        ):
            answer = await client.generate(
                "base", PROMPT, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, **ours
            ).result()
            assert answer.token_ids == oracle.generate(PROMPT, NUM_TOKENS, eos_token_id=None, **theirs)
            assert answer.token_ids != plain


@async_test
async def test_a_least_length_is_that_of_transformers(zoo: Zoo, oracle: Oracle) -> None:
    (plain,) = oracle.greedy([PROMPT], NUM_TOKENS)
    stop = plain[2]
    async with served(zoo) as client:
        options: dict[str, Any] = {"temperature": 0, "max_tokens": NUM_TOKENS, "stop_token_ids": [stop]}
        short = await client.generate("base", PROMPT, **options).result()
        longer = await client.generate("base", PROMPT, min_tokens=9, **options).result()
    assert short.token_ids == plain[:3]
    # 2 is the variant's own end token.
    assert longer.token_ids == oracle.generate(PROMPT, NUM_TOKENS, min_new_tokens=9, eos_token_id=[stop, 2])
    assert len(longer.token_ids) >= 9


@async_test
async def test_logprobs_under_penalties_are_those_of_the_unmodified_logits(zoo: Zoo, oracle: Oracle) -> None:
    async with served(zoo) as client:
        answer = await client.generate(
            "base", PROMPT, seed=1, max_tokens=9, ignore_eos=True, logprobs=4, prompt_logprobs=True,
            repetition_penalty=1.5, presence_penalty=1.0, logit_bias={9: 20.0},
        ).result()  # fmt: skip
    assert 9 in answer.token_ids
    sequence = (*PROMPT, *answer.token_ids)
    reference = oracle.logits([sequence])[0].log_softmax(-1)
    for i, position in enumerate((*answer.prompt_logprobs, *answer.logprobs)):
        assert position.token_id == sequence[i + 1]
        assert position.logprob == pytest.approx(reference[i, sequence[i + 1]].item(), abs=1e-3)
        best = torch.topk(reference[i], 4)
        assert [token for token, _ in position.top] == best.indices.tolist()
        assert [value for _, value in position.top] == pytest.approx(best.values.tolist(), abs=1e-3)


SAMPLED: dict[str, Any] = {
    "temperature": 1.0, "seed": 5, "max_tokens": 20, "ignore_eos": True,
    "repetition_penalty": 1.3, "presence_penalty": 0.8, "frequency_penalty": 0.6,
}  # fmt: skip


def resumed_call(count: int = 1) -> GenerateCall:
    """`SAMPLED` as a call, as the client makes it."""
    sampling = SamplingWishes(
        1.0, seed=5, repetition_penalty=1.3, presence_penalty=0.8, frequency_penalty=0.6, n=count
    )
    return GenerateCall("mine", "base", PROMPT, sampling, StoppingWishes(20, ignore_eos=True))


@pytest.mark.parametrize("cut", [1, 7, 19, 20])
@async_test
async def test_penalties_are_right_after_a_resume(zoo: Zoo, cut: int) -> None:
    """What was sent before counts as output, not as prompt: presence and frequency go on from there."""
    async with served(zoo) as client:
        whole = await client.generate("base", PROMPT, **SAMPLED).result()
        call = replace(resumed_call(), resume_from=cut)
        rest = [chunk async for chunk in client._inference.stream(call, None)]
        tokens = tuple(token for chunk in rest for token in chunk.token_ids)
        assert (*whole.token_ids[:cut], *tokens) == whole.token_ids
        as_prompt = await client.generate(
            "base", (*PROMPT, *whole.token_ids[:cut]), **{**SAMPLED, "max_tokens": 20 - cut or 1}
        ).result()
        if cut < 19:
            assert as_prompt.token_ids != whole.token_ids[cut:]


@async_test
async def test_choices_are_what_each_is_alone_and_go_on_where_they_broke_off(zoo: Zoo) -> None:
    async with served(zoo) as client:
        whole = await client.generate("base", PROMPT, n=4, **SAMPLED).results()
        assert len({one.token_ids for one in whole}) == 4
        alone = await client.generate("base", PROMPT, **SAMPLED).result()
        assert whole[0].token_ids == alone.token_ids
        assert {one.finish.usage.completion_tokens for one in whole} == {80}
        await everything_is_free(client)

        generation = client.generate("base", PROMPT, n=4, **SAMPLED)
        head, call = [], resumed_call(4)
        async for chunk in generation:
            head.append(chunk)
            call = continued(call, chunk)
            if len(head) == 25:
                break
        await generation.aclose()
        await everything_is_free(client)
        assert any(call.resume_choices)
        rest = [chunk async for chunk in client._inference.stream(call, None)]
        ended = {chunk.choice for chunk in head if chunk.finish is not None}
        pieces = collect_choices([*head, *(chunk for chunk in rest if chunk.choice not in ended)], 4)
        assert [one.token_ids for one in pieces] == [one.token_ids for one in whole]
        assert [one.text for one in pieces] == [one.text for one in whole]


@async_test
async def test_leaving_a_call_of_many_choices_frees_all_of_them(zoo: Zoo) -> None:
    async with served(zoo) as client:
        generation = client.generate("base", PROMPT, n=8, max_tokens=400, ignore_eos=True)
        chunks = aiter(generation)
        seen: set[int] = set()
        while len(seen) < 8:
            seen.add((await anext(chunks)).choice)
        assert (await client.status()).running_requests == 8
        await generation.aclose()
        await everything_is_free(client)


@async_test
async def test_absurd_values_leave_a_server_that_goes_on(zoo: Zoo) -> None:
    async with served(zoo) as client:
        for options, field in (
            ({"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
            ({"presence_penalty": float("nan")}, "sampling.presence_penalty"),
            ({"frequency_penalty": 3.0}, "sampling.frequency_penalty"),
            ({"logit_bias": {1: float("-inf")}}, "sampling.logit_bias[1]"),
            ({"logit_bias": {10**6: 1.0}}, "sampling.logit_bias[1000000]"),
            ({"min_tokens": 10**6}, "stopping.min_tokens"),
            ({"n": 10**6}, "sampling.n"),
        ):
            with pytest.raises(SamplingError) as caught:
                await client.generate("base", PROMPT, **{"max_tokens": 4, **options}).results()
            assert caught.value.field == field
        assert (await client.generate("base", PROMPT, max_tokens=2, ignore_eos=True).result()).token_ids


@async_test
async def test_choices_that_never_fit_fail_as_one_call(zoo: Zoo) -> None:
    async with served(zoo, replace(ENGINE, kv_cache_bytes=1 << 16)) as client:
        with pytest.raises(KvCapacityError):
            await client.generate("base", PROMPT, n=2, max_tokens=400).results()
        await everything_is_free(client)
