"""Rotary positions that depend on the length of a sequence, against transformers' `generate`.

transformers keeps the length that it has seen last in the model, so each question is put to a copy of it.
"""

import asyncio
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Glm4Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from blockserve.common.api.cluster import ChainSpan
from blockserve.common.api.engine import EngineRequest
from blockserve.worker.limits import EngineConfig
from blockserve.worker.peers.kv_transfer import PrefixRef, to_bytes
from blockserve.worker.peers.messages import BusyMsg, OpenMsg
from blockzoo.evaluation.forward import LinkLoader, Windows
from blockzoo.zoo import Zoo
from support.adapters import ADAPTERS, load_adapted, make_adapter
from support.engine import EXACT_CONFIG, GREEDY, Ask, EngineHarness
from support.models import ModelSpec, load_model, make_checkpoint
from support.oracle import LOGITS_TOLERANCE, Prompt, logits_error
from support.spans import SpanCluster, span_cluster
from support.tiny import SMALL, TinyZoo
from support.variants import Variant

ORIGINAL, CONTEXT, NUM_TOKENS = 32, 128, 26
LENGTHS = (10, 31, 32, 33, 70)
"""Of prompts: answers stay below the original context, cross it, or begin beyond it."""


_LAYERS = {"num_hidden_layers": 2}


def _dynamic(**options: Any) -> dict[str, Any]:
    rope = {"rope_type": "dynamic", "rope_theta": 300.0, "factor": CONTEXT / ORIGINAL}
    return {**_LAYERS, **options, "max_position_embeddings": ORIGINAL, "rope_parameters": rope}


def _longrope(pairs: int = 7, **options: Any) -> dict[str, Any]:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 300.0,
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [1.5 + i for i in range(pairs)],
        "original_max_position_embeddings": ORIGINAL,
    }
    return {**_LAYERS, **options, "max_position_embeddings": CONTEXT, "rope_parameters": rope}


_MHA = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
PHI3 = {"hidden_size": 126, "original_max_position_embeddings": ORIGINAL}
SPECS = {
    "dynamic": ModelSpec(options=_dynamic()),
    "longrope": ModelSpec(options=_longrope()),
    "phi3": ModelSpec(Phi3Config, _longrope(**PHI3)),
}
FAMILIES = {
    "mistral": ModelSpec(MistralConfig, _longrope(sliding_window=19)),
    "qwen2": ModelSpec(Qwen2Config, _dynamic(hidden_size=126)),
    "qwen3": ModelSpec(Qwen3Config, _dynamic()),
    "glm4": ModelSpec(Glm4Config, _dynamic(head_dim=12)),
    "granite": ModelSpec(GraniteConfig, _longrope(attention_multiplier=0.2)),
    "olmo2": ModelSpec(Olmo2Config, _dynamic(), seed=2),
    "smollm3": ModelSpec(SmolLM3Config, _dynamic(no_rope_layers=[1, 0])),
    "gemma2": ModelSpec(Gemma2Config, _dynamic(query_pre_attn_scalar=11)),
    "llama-mha": ModelSpec(LlamaConfig, _longrope(8, **_MHA)),
    "phi3-window": ModelSpec(Phi3Config, _longrope(**PHI3, sliding_window=19)),
    "phi3-partial": ModelSpec(Phi3Config, _longrope(4, **PHI3, partial_rotary_factor=0.6)),
}


class Theirs:
    """A model in transformers that has never seen a sequence, whatever it is asked."""

    def __init__(self, base: Path, adapter: Path | None = None) -> None:
        self._model = load_model(base) if adapter is None else load_adapted(base, adapter)
        self._model.generation_config.eos_token_id = None
        self._known: dict[tuple[Prompt, int], Prompt] = {}

    def generate(self, prompt: Prompt, num_tokens: int = NUM_TOKENS) -> Prompt:
        if (prompt, num_tokens) not in self._known:
            self._known[prompt, num_tokens] = self._generate(prompt, num_tokens)
        return self._known[prompt, num_tokens]

    @torch.inference_mode()
    def _generate(self, prompt: Prompt, num_tokens: int) -> Prompt:
        ids = torch.tensor([prompt])
        found = copy.deepcopy(self._model).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
        )
        return tuple(found[0, len(prompt) :].tolist())

    @torch.inference_mode()
    def logits(self, sequence: Prompt) -> Tensor:
        return copy.deepcopy(self._model)(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]


def prompts(*lengths: int, seed: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, 501, (length,), generator=generator).tolist()) for length in lengths]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("growing")


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, tuple[Variant, Theirs]]:
    """Ours and theirs of each."""
    paths = {name: make_checkpoint(spec, folder / name) for name, spec in SPECS.items()}
    return {name: (Variant(name, path), Theirs(path)) for name, path in paths.items()}


@pytest.fixture
def harness(tmp_path: Path) -> Any:
    with EngineHarness(tmp_path / "zoo") as engine:
        yield engine


def check(engine: EngineHarness, ours: Variant, theirs: Theirs) -> None:
    """Answers of all lengths at the same time, again over the pages that they left, and logits of prompts."""
    chain, asked = engine.load(ours), prompts(*LENGTHS)
    want = [theirs.generate(prompt) for prompt in asked]
    assert engine.greedy(chain, asked, NUM_TOKENS) == want
    hits = engine.engine.report().prefix_hit_tokens
    assert [engine.greedy(chain, [prompt], NUM_TOKENS)[0] for prompt in asked] == want
    assert engine.engine.report().prefix_hit_tokens - hits > 100
    for prompt, logits in zip(asked, engine.logits(chain, asked), strict=True):
        assert logits_error(logits, theirs.logits(prompt)) <= LOGITS_TOLERANCE


@pytest.mark.parametrize("name", SPECS)
def test_answers_are_those_of_generate(harness, made, name):
    check(harness, *made[name])
    assert harness.engine.report().preemptions == 0
    (chain,) = harness.engine.report().chains
    assert harness.zoo.chain(chain.chain).context_length == CONTEXT


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_answer_as_generate_does(harness, folder, name):
    path = make_checkpoint(FAMILIES[name], folder / name)
    check(harness, Variant(name, path), Theirs(path))


@pytest.mark.parametrize("name", SPECS)
def test_adapters_on_them_answer_as_peft_does(harness, made, folder, name):
    base, _ = made[name]
    path = make_adapter(ADAPTERS["every-linear"], base.path, folder / f"{name}-adapter")
    adapter, theirs = Variant(f"{name}-adapter", path, base, is_adapter=True), Theirs(base.path, path)
    chains = harness.load(base), harness.load(adapter)
    asked = prompts(31, 50)
    both = harness.run([Ask(chain, prompt, NUM_TOKENS) for chain in chains for prompt in asked])
    assert both[2:] == [theirs.generate(prompt) for prompt in asked]
    assert both[:2] != both[2:]


@pytest.mark.parametrize("name", SPECS)
def test_pages_are_shared_only_where_their_angles_are_the_same(harness, made, name):
    ours, theirs = made[name]
    chain, [tokens] = harness.load(ours), prompts(70)

    def cached(prompt: Prompt) -> int:
        before = harness.engine.report().prefix_hit_tokens
        assert harness.greedy(chain, [prompt], 3) == [theirs.generate(prompt, 3)]
        return harness.engine.report().prefix_hit_tokens - before

    page = EXACT_CONFIG.kv_page_tokens
    assert cached(tokens[:29]) == 0
    assert cached(tokens[:25]) == 21  # both short
    assert cached(tokens[:60]) == 0  # the first that is long
    assert cached(tokens) == (0 if name == "dynamic" else 60 // page * page)
    assert cached(tokens[:60]) == 59 // page * page
    assert cached(tokens[:28]) == 27 // page * page


@pytest.mark.parametrize("name", SPECS)
def test_requests_that_lose_their_pages_answer_the_same(tmp_path, made, name):
    ours, theirs = made[name]
    asked = prompts(60, 33, 32, 31, 20)  # the last in rank pay
    config = replace(EXACT_CONFIG, kv_cache_bytes=110_000, kv_reserve_tokens=1, max_running_requests=5)
    with EngineHarness(tmp_path / "zoo", config) as engine:
        answers = engine.greedy(engine.load(ours), asked, NUM_TOKENS)
        assert engine.engine.report().preemptions > 0
    assert answers == [theirs.generate(prompt) for prompt in asked]


@pytest.mark.parametrize("name", SPECS)
def test_deterministic_logits_do_not_depend_on_how_a_prompt_is_cut(tmp_path, made, name):
    ours, _ = made[name]
    found = []
    for tokens in (5, 512):
        config = EngineConfig(
            dtype="bfloat16", num_threads=1, deterministic=True, max_running_requests=5,
            max_tokens_per_pass=tokens, kv_page_tokens=7, kv_cache_bytes=8 << 20,
        )  # fmt: skip
        with EngineHarness(tmp_path / f"zoo{tokens}", config) as engine:
            chain = engine.load(ours)
            found.append((engine.logits(chain, prompts(*LENGTHS)), engine.greedy(chain, prompts(31, 40), 30)))
    (some, answers), (whole, again) = found
    assert all(map(torch.equal, some, whole))
    assert answers == again


@pytest.mark.parametrize("name", SPECS)
def test_windows_of_an_evaluation_are_plain_forward_passes(tmp_path, made, name):
    ours, theirs = made[name]
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(ours.path, name="model")
    links = zoo.chain(zoo.resolve("model").chain).links
    loader = LinkLoader(zoo, torch.float32, torch.device("cpu"))
    *body, head = loader.load(links)
    for length in (20, 90):
        windows = prompts(length, length)
        batch = Windows(windows, loader)
        logits = batch.logits(head, batch.run(body, batch.token_ids)).split(length)
        for window, rows in zip(windows, logits, strict=True):
            assert logits_error(rows, theirs.logits(window)) <= LOGITS_TOLERANCE


# ---- several workers


async def _tokens(cluster: SpanCluster, request: EngineRequest, most: int = CONTEXT) -> list[int]:
    """The next tokens of an answer, which is given up after `most`."""
    stream = cluster.engine("a").generate(request)
    told: list[int] = []
    async for batch in stream:
        told.extend(event.token_id for event in batch)
        if len(told) >= most:
            break
    await stream.aclose()
    return told[:most]


@pytest.fixture
def tiny(tmp_path: Path, made: dict[str, tuple[Variant, Theirs]]) -> TinyZoo:
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    for name, (ours, _) in made.items():
        zoo.register(ours.path, name=name)
    return TinyZoo(zoo, tmp_path / "zoo", {name: zoo.resolve(name).chain for name in made})


@pytest.mark.parametrize("name", SPECS)
def test_workers_of_a_path_agree_on_the_angles(tiny, made, name):
    """Also when pages are short at the second of them."""
    asked = prompts(*LENGTHS)
    want = [list(made[name][1].generate(prompt)) for prompt in asked]
    chain = tiny.chains[name]

    async def work() -> list[list[int]]:
        path = cluster.path(chain, a=2, b=0)
        await cluster.load(chain, path)
        return await asyncio.gather(
            *(
                _tokens(cluster, EngineRequest(f"r{place}", chain, prompt, GREEDY, NUM_TOKENS, path=path))
                for place, prompt in enumerate(asked)
            )
        )

    with span_cluster(tiny, "a b") as cluster:
        assert asyncio.run(work()) == want
        opened = [message for _, message in cluster.wire.sent if isinstance(message, OpenMsg)]
        crossing = sum(length <= ORIGINAL for length in LENGTHS) if name == "phi3" else 0
        assert len(opened) == len(asked) + crossing
    with span_cluster(tiny, "a b", b=replace(SMALL, kv_cache_bytes=65_000)) as cluster:
        assert asyncio.run(work()) == want
        assert cluster.engine("b").report().preemptions + cluster.wire.count(BusyMsg)


@pytest.mark.parametrize(("length", "told"), [(30, 1), (30, 5), (45, 5)])
@pytest.mark.parametrize("name", SPECS)
def test_an_answer_goes_on_at_another_worker(tiny, made, name, length, told):
    """Its keys and values are moved, and found: what was sampled counts as answer and not as prompt."""
    [prompt] = prompts(length)
    want = list(made[name][1].generate(prompt))
    chain = tiny.chains[name]

    async def work() -> None:
        old, new = cluster.path(chain, a=2, b=0), cluster.path(chain, a=2, c=0)
        await cluster.load(chain, old)
        await cluster.load(chain, new)
        request = EngineRequest("r", chain, prompt, GREEDY, NUM_TOKENS, path=old)
        first = await _tokens(cluster, request, told)
        assert first == want[:told]
        prefix = PrefixRef(ChainSpan(chain, old[1].run), "", (*prompt, *first), len(prompt))
        pages = await cluster.engine("b").export_kv(prefix, 0, 1000)
        moved = [(page.place, to_bytes(page.keys), to_bytes(page.values)) for page in pages]
        target = replace(prefix, span=ChainSpan(chain, new[1].run))
        assert await cluster.engine("c").import_kv(target, moved) == len(pages)
        if length > ORIGINAL:
            assert pages
            assert not await cluster.engine("b").export_kv(replace(prefix, prompt_tokens=0), 0, 9) or (
                name == "phi3"
            )
        later = replace(request, path=new, epoch=1, output=tuple(first))
        assert first + await _tokens(cluster, later) == want

    with span_cluster(tiny, "a b c") as cluster:
        asyncio.run(work())
