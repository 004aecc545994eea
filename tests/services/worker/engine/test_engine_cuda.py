"""The same engine on a CUDA device: float32 answers equal the CPU's, for every kind of variant."""

import asyncio
from dataclasses import replace

import pytest

from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.worker.engine.debug import prompt_logits
from blockserve.worker.engine.engine import BlockEngine
from support.tiny import SMALL, TinyZoo

_PROMPTS = [tuple(range(3, 3 + length)) for length in (1, 8, 33, 100)]


async def _answers(engine: BlockEngine, tiny: TinyZoo) -> list[list[int]]:
    async def one(name: str, prompt: tuple[int, ...]) -> list[int]:
        request = EngineRequest(
            f"{name}{len(prompt)}", tiny.chains[name], prompt, SamplingParams(temperature=0.0), 24
        )
        return [event.token_id async for batch in engine.generate(request) for event in batch]

    for chain in tiny.chains.values():
        await engine.load(chain)
    return list(await asyncio.gather(*(one(name, prompt) for name in tiny.chains for prompt in _PROMPTS)))


@pytest.mark.gpu
def test_cuda_answers_are_the_cpus(tiny: TinyZoo) -> None:
    answers, logits = [], []
    for device in ("cpu", "cuda"):
        engine = BlockEngine(tiny.zoo, replace(SMALL, device=device))
        engine.start()
        answers.append(asyncio.run(_answers(engine, tiny)))
        logits.append(prompt_logits(engine, tiny.chains["all"], _PROMPTS[-1]).cpu())
        engine.stop()
    assert answers[0] == answers[1]
    assert (logits[0] - logits[1]).abs().max() <= 1e-4 * logits[0].abs().max()
