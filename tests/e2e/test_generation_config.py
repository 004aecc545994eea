"""What generation_config.json asks for, from zoo to client: the tokens of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from blockserve.client.aio import AsyncClient
from blockserve.embedded.server import EmbeddedServer
from blockserve.embedded.settings import EmbeddedSettings
from blockserve.worker.limits import EngineConfig
from blockzoo.zoo import Zoo
from support.edge import async_test
from support.variants import VariantFactory

PROMPT = (11, 12, 13)
ENGINE = EngineConfig(dtype="float32", num_threads=1, kv_cache_bytes=4 << 20)


def cases(answer: list[int]) -> dict[str, dict[str, Any]]:
    """Generation configs, given the greedy answer without one of 8 tokens."""
    first, second, third = answer[:3]
    pairs = [[[first, second], -50.0], [[PROMPT[-1], 40], 60.0], [[PROMPT[-2], PROMPT[-1], 40], -70.0]]
    return {
        "greedy-unless-told": {"temperature": 0.6, "top_p": 0.9},
        "max-new-tokens": {"max_new_tokens": 4},
        "max-length": {"max_length": 9},
        "max-new-tokens-first": {"max_length": 4, "max_new_tokens": 5},
        "min-new-tokens": {"eos_token_id": third, "min_new_tokens": 6},
        "min-length": {"eos_token_id": third, "min_length": 8},
        "suppress": {"suppress_tokens": [first, second]},
        "begin-suppress": {"begin_suppress_tokens": [first]},
        "bad-words": {"bad_words_ids": [[first]]},
        "bad-words-long": {"bad_words_ids": [[first, second], [PROMPT[-1], 40], [second, third, answer[3]]]},
        "bad-words-end": {"eos_token_id": third, "bad_words_ids": [[third]]},
        "sequence-bias": {"sequence_bias": [[[first], -50.0], [[40], 1.5]]},
        "sequence-bias-long": {"sequence_bias": pairs},
        "everything": {
            "suppress_tokens": [first],
            "bad_words_ids": [[second]],
            "sequence_bias": pairs,
            "repetition_penalty": 1.3,
        },
    }


def expected(folder: Path, config: Mapping[str, Any]) -> list[int]:
    length = {} if {"max_new_tokens", "max_length"} & set(config) else {"max_new_tokens": 8}
    ids = torch.tensor([PROMPT])
    model = AutoModelForCausalLM.from_pretrained(folder)
    out: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), **length)[
        0, len(PROMPT) :
    ].tolist()
    return out


@async_test
async def test_answers_are_those_of_transformers(factory: VariantFactory, tmp_path: Path) -> None:
    base = factory.checkpoint("llama-gqa").path
    (plain,) = factory.oracle(factory.checkpoint("llama-gqa")).greedy([PROMPT], 8)
    wanted = {}
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    for name, config in cases(list(plain)).items():
        folder = tmp_path / name
        shutil.copytree(base, folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **config}))
        zoo.register(folder, name=name)
        wanted[name] = expected(folder, config), {"max_new_tokens", "max_length"} & set(config)
    settings = EmbeddedSettings.load(
        zoo=zoo.url, listen="127.0.0.1:0", drain_seconds=0.0, metrics_listen="off", engine=ENGINE
    )
    server = EmbeddedServer(settings)
    await server.start()
    try:
        async with AsyncClient(server.address, resume_attempts=0) as client:
            for name, (tokens, bounded) in wanted.items():
                options: dict[str, Any] = {} if bounded else {"max_tokens": 8}
                if name != "greedy-unless-told":
                    options["temperature"] = 0.0
                answer = await client.generate(name, PROMPT, **options).result()
                assert list(answer.token_ids) == tokens, name
    finally:
        await server.stop()
