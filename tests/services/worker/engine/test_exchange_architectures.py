"""Every architecture, and every kind of adapter, over several workers: the answers of one, however cut."""

import asyncio

import pytest

from blockserve.common.api.engine import EngineRequest, SamplingParams, TokenEvent
from blockserve.worker.engine.engine import BlockEngine
from blockzoo.zoo import Zoo
from support.adapters import FURTHER_METHODS
from support.models import FURTHER
from support.spans import SpanCluster, span_cluster
from support.tiny import SMALL, TinyZoo
from support.variants import VariantFactory

PROMPTS = (tuple(range(3, 10)), tuple(range(3, 103)))
CUTS = ({"a": 3, "b": 4, "c": 0}, {"a": 2, "b": 3, "c": 4, "d": 0})


@pytest.fixture(scope="module")
def zoo(factory: VariantFactory, tmp_path_factory: pytest.TempPathFactory) -> TinyZoo:
    """A checkpoint of each, and an adapter."""
    folder = tmp_path_factory.mktemp("architectures") / "zoo"
    made = Zoo.open(folder, create=True)
    for name in FURTHER:
        made.register(factory.checkpoint(name).path, name=name)
    adapter = factory.adapter(factory.checkpoint("gemma2"), "every-linear")
    made.register(adapter.path, name="adapter", base="gemma2")
    return TinyZoo(made, folder, {name: made.resolve(name).chain for name in (*FURTHER, "adapter")})


@pytest.fixture(scope="module")
def adapters(factory: VariantFactory, tmp_path_factory: pytest.TempPathFactory) -> TinyZoo:
    """One tied checkpoint, with adapters on it that are more than LoRA on linear modules."""
    folder = tmp_path_factory.mktemp("adapters") / "zoo"
    made, base = Zoo.open(folder, create=True), factory.checkpoint("llama-gqa-tied")
    made.register(base.path, name="base")
    names = ("dora-ends", "biases", "tokens-and-head", "embedding-tied")
    for name in names:
        made.register(factory.adapter(base, name, spec=FURTHER_METHODS[name]).path, name=name, base="base")
    return TinyZoo(made, folder, {name: made.resolve(name).chain for name in ("base", *names)})


async def answers(engine: BlockEngine, requests: list[EngineRequest]) -> list[list[int]]:
    async def answer(request: EngineRequest) -> list[TokenEvent]:
        return [event async for batch in engine.generate(request) for event in batch]

    found = await asyncio.gather(*map(answer, requests))
    return [[event.token_id for event in events] for events in found]


def ask(name: str, zoo: TinyZoo, prompt: tuple[int, ...], **more: object) -> EngineRequest:
    greedy = SamplingParams(temperature=0.0)
    return EngineRequest(f"{name} {len(prompt)}", zoo.chains[name], prompt, greedy, 12, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["zoo", "adapters"])
def test_tokens_are_those_of_one_worker(which: str, request: pytest.FixtureRequest) -> None:
    zoo: TinyZoo = request.getfixturevalue(which)

    async def whole(engine: BlockEngine) -> list[list[int]]:
        for chain in zoo.chains.values():
            await engine.load(chain)
        return await answers(engine, [ask(name, zoo, prompt) for name in zoo.chains for prompt in PROMPTS])

    async def cut(cluster: SpanCluster, cuts: dict[str, int]) -> list[list[int]]:
        requests = []
        for name, chain in zoo.chains.items():
            path = cluster.path(chain, **cuts)
            await cluster.load(chain, path)
            requests += [ask(name, zoo, prompt, path=tuple(path)) for prompt in PROMPTS]
        return await answers(cluster.engine("a"), requests)

    engine = BlockEngine(zoo.zoo, SMALL)
    engine.start()
    try:
        want = asyncio.run(whole(engine))
    finally:
        engine.stop()
    assert len({tuple(answer) for answer in want}) > len(want) // 2
    for cuts in CUTS:
        with span_cluster(zoo, " ".join(cuts)) as cluster:
            assert asyncio.run(cut(cluster, cuts)) == want
