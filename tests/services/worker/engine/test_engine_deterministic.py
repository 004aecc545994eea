"""`deterministic`: no bit of a bfloat16 request depends on what it is computed with."""

import asyncio
import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blockkernels.backends import CpuBackend, FusedLayers
from blockkernels.backends import cpu as cpu_backend
from blockkernels.decoder import DecoderLayer
from blockkernels.native import library
from blockserve.common.api.cluster import ChainSpan
from blockserve.common.api.engine import EngineRequest, SamplingParams, TokenEvent
from blockserve.common.errors import ConfigurationError
from blockserve.worker.compute import executor
from blockserve.worker.engine.debug import prompt_logits
from blockserve.worker.engine.engine import BlockEngine
from blockserve.worker.limits import EngineConfig
from blockzoo.manifest import ChainId
from support.adapters import FURTHER_METHODS
from support.engine import EngineHarness
from support.models import FURTHER_EVEN
from support.tiny import TinyZoo
from support.variants import Variant, VariantFactory

needs_bf16 = pytest.mark.skipif(
    CpuBackend().why_inexact(torch.bfloat16) is not None,
    reason="this machine has no compiler, or no bfloat16 products",
)

CONFIG = EngineConfig(
    dtype="bfloat16", num_threads=1, deterministic=True, kv_cache_bytes=64 << 20, max_tokens_per_pass=512
)
OTHERWISE = {
    "chunks of 64": replace(CONFIG, max_tokens_per_pass=64),
    "token by token": replace(CONFIG, max_tokens_per_pass=1, max_running_requests=1),
    "odd pages": replace(CONFIG, kv_page_tokens=7, max_tokens_per_pass=77),
}

Question = tuple[ChainId, tuple[int, ...]]


ODD = ("llama-gqa", "qwen2", "qwen3", "mistral-window", "llama-gelu")
EVEN = (
    "llama-even",
    "qwen2-even",
    "qwen3-even",
    "mistral-even-window",
    "llama-even-biases",
    "llama-even-gelu",
)
LONG_FURTHER = pytest.param(FURTHER_EVEN, marks=pytest.mark.long)
"""Most of a minute of a core without bfloat16 instructions; one test below asks them less."""


@pytest.fixture(scope="module", params=[ODD, EVEN, LONG_FURTHER], ids=["odd", "even", "further"])
def family(factory: VariantFactory, request: pytest.FixtureRequest) -> list[Variant]:
    """Everything that computes differently: adapters of mixed ranks, biases, norms, windows, soft caps, ...

    Even sizes are what the kernels take that compute a layer in one call.
    """
    first, *others = request.param
    base = factory.checkpoint(first)
    return [
        base,
        factory.adapter(base, "all-linear"),
        factory.adapter(base, "patterns"),
        factory.adapter(base, "lm-head"),
        factory.top_quarter(base),
        *map(factory.checkpoint, others),
    ]


def questions(chains: Sequence[ChainId], vocab: int, lengths: Sequence[int]) -> list[Question]:
    rng = random.Random(1)
    return [
        (chain, tuple(rng.randrange(vocab) for _ in range(length))) for chain in chains for length in lengths
    ]


def alone(engine: EngineHarness, asked: Sequence[Question]) -> list[torch.Tensor]:
    return [prompt_logits(engine.engine, *one) for one in asked]


def together(engine: EngineHarness, asked: Sequence[Question]) -> list[torch.Tensor]:
    """All at the same time."""
    found: dict[int, torch.Tensor] = {}

    def look(place: int) -> None:
        found[place] = prompt_logits(engine.engine, *asked[place])

    threads = [threading.Thread(target=look, args=(place,)) for place in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[place] for place in range(len(asked))]


def assert_same_bits(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    assert [torch.equal(left, right) for left, right in zip(got, want, strict=True)] == [True] * len(want)


def assert_deterministic(
    folder: Path,
    variants: Sequence[Variant],
    vocab: int,
    lengths: Sequence[int],
    otherwise: Sequence[str] = tuple(OTHERWISE),
) -> None:
    with EngineHarness(folder, CONFIG) as engine:
        asked = questions([engine.load(one) for one in variants], vocab, lengths)
        want = alone(engine, asked)
        assert_same_bits(together(engine, asked), want)
        registered = engine._registered
    for name in otherwise:
        with EngineHarness(folder, OTHERWISE[name]) as engine:
            engine._registered = registered
            for one in variants:
                engine.load(one)
            # A pass for each token: the longest prompts would be most of the work.
            places = [i for i, one in enumerate(asked) if len(one[1]) <= 70 or name != "token by token"]
            again = together(engine, [asked[place] for place in places])
            assert_same_bits(again, [want[place] for place in places])


@needs_bf16
def test_logits_alone_in_company_and_in_other_chunks(tmp_path: Path, family: list[Variant]) -> None:
    assert_deterministic(tmp_path / "zoo", family, 501, (1, 2, 70, 130))


@needs_bf16
def test_logits_of_further_families(tmp_path: Path, factory: VariantFactory) -> None:
    variants = [*map(factory.checkpoint, FURTHER_EVEN)]
    variants += [factory.adapter(one, "every-linear") for one in variants[:1]]
    assert_deterministic(tmp_path / "zoo", variants, 501, (2, 90), ["odd pages"])


@needs_bf16
def test_logits_of_adapters_that_are_more_than_lora(tmp_path: Path, factory: VariantFactory) -> None:
    """With the base and plain LoRA, whose layers are computed in one call without the others."""
    base = factory.checkpoint("llama-even")
    names = ("dora-ends", "biases", "tokens-and-head", "embedding")
    variants = [base, factory.adapter(base, "all-linear")]
    variants += [factory.adapter(base, name, spec=FURTHER_METHODS[name]) for name in names]
    assert_deterministic(tmp_path / "zoo", variants, 501, (2, 66), ["odd pages"])


@needs_bf16
@pytest.mark.model
@pytest.mark.long  # over a minute of a core without bfloat16 instructions; tiny models run above
def test_logits_of_smollm2(tmp_path: Path, factory: VariantFactory, smollm2: Path) -> None:
    base = factory.existing("smollm2", smollm2)
    variants = [base, factory.adapter(base, "all-linear"), factory.adapter(base, "q-v", seed=2)]
    assert_deterministic(tmp_path / "zoo", variants, 40000, (1, 37, 100))


@needs_bf16
def test_decoded_tokens_have_the_logits_of_a_prompt(tmp_path: Path, family: list[Variant]) -> None:
    """What was decoded token by token in a crowd, a prompt in chunks gives again: the way of a replay."""
    with EngineHarness(tmp_path / "zoo", CONFIG) as engine:
        asked = questions([engine.load(one) for one in family], 501, (3, 40))

        def request(place: int) -> EngineRequest:
            greedy = SamplingParams(temperature=0.0)
            return EngineRequest(f"r{place}", *asked[place], greedy, 12, logprobs=3)

        async def crowd() -> list[list[TokenEvent]]:
            return await asyncio.gather(*(engine._events(request(place)) for place in range(len(asked))))

        answers = engine._loop.run_until_complete(crowd())
        for place, events in enumerate(answers):
            again = engine.events(request(place))  # alone
            for one, was in zip(again, events, strict=True):
                assert (one.token_id, one.logprobs) == (was.token_id, was.logprobs)
            chain, prompt = asked[place]
            output = tuple(event.token_id for event in events)
            logits = prompt_logits(engine.engine, chain, prompt + output[:-1])[len(prompt) - 1 :]
            assert tuple(logits.argmax(1).tolist()) == output


@needs_bf16
def test_cached_prefixes_and_preemption_change_no_bit(tmp_path: Path, family: list[Variant]) -> None:
    """The same answers cold and alone, over cached pages, and in a pool that all of them outgrow."""
    roomy = replace(CONFIG, kv_page_tokens=16)

    def request(place: int) -> EngineRequest:
        sampling = (
            SamplingParams(temperature=0.8, seed=place) if place % 2 else SamplingParams(temperature=0.0)
        )
        return EngineRequest(f"r{place}", *asked[place], sampling, 24, logprobs=5)

    async def crowd(engine: EngineHarness) -> list[list[TokenEvent]]:
        return await asyncio.gather(*(engine._events(request(place)) for place in range(len(asked))))

    def told(events: Sequence[TokenEvent]) -> list[object]:
        return [(event.token_id, event.logprobs) for event in events]

    with EngineHarness(tmp_path / "zoo", replace(roomy, prefix_sharing="off")) as engine:
        asked = questions([engine.load(one) for one in family[:5]], 501, (40, 75))
        want = [told(engine.events(request(place))) for place in range(len(asked))]
        assert engine.engine.report().prefix_hit_tokens == 0
        registered = engine._registered
        report = engine.engine.report()
        page_bytes = report.kv_bytes_total // report.kv_pages_total
        tight = (
            24 * page_bytes * (len(engine.zoo.chain(asked[0][0]).links) - 2)
        )  # ten requests want up to 7 a layer
    with EngineHarness(tmp_path / "zoo", roomy) as engine:
        engine._registered = registered
        for one in family[:5]:
            engine.load(one)
        for _ in range(2):
            assert [told(engine.events(request(place))) for place in range(len(asked))] == want
        assert [told(events) for events in engine._loop.run_until_complete(crowd(engine))] == want
        assert engine.engine.report().prefix_hit_tokens > 0
    with EngineHarness(tmp_path / "zoo", replace(roomy, kv_cache_bytes=tight)) as engine:
        engine._registered = registered
        for one in family[:5]:
            engine.load(one)
        assert [told(events) for events in engine._loop.run_until_complete(crowd(engine))] == want
        assert engine.engine.report().preemptions > 0


@needs_bf16
def test_a_layer_in_one_call_has_the_bits_of_its_parts(
    tmp_path: Path, family: list[Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With adapters and all that families do differently."""
    native = library()
    if native is None or not native.linear_panel:
        pytest.skip("this processor does not multiply pairs of bfloat16")
    in_one_call: list[int] = []
    run_layers = executor._SegmentContext.run_layers

    def watched(context: Any, layers: FusedLayers, *args: Any) -> None:
        in_one_call.append(len(layers))
        run_layers(context, layers, *args)

    monkeypatch.setattr(executor._SegmentContext, "run_layers", watched)
    with EngineHarness(tmp_path / "zoo", CONFIG) as engine:
        asked = questions([engine.load(one) for one in family], 501, (1, 13, 90))
        want = together(engine, asked)
        registered = engine._registered
    assert (max(in_one_call, default=0) > 1) == family[0].name.endswith("-even")
    in_one_call.clear()
    monkeypatch.setattr(DecoderLayer, "can_compute", staticmethod(lambda *layer: False))
    with EngineHarness(tmp_path / "zoo", CONFIG) as engine:
        engine._registered = registered
        for one in family:
            engine.load(one)
        assert_same_bits(together(engine, asked), want)
    assert not in_one_call


def test_it_needs_the_c_kernels(tiny: TinyZoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "library", lambda: None)
    with pytest.raises(ConfigurationError, match="need the C kernels") as caught:
        BlockEngine(tiny.zoo, CONFIG)
    assert "compiler" in caught.value.hint


@needs_bf16
def test_it_needs_packed_products(tiny: TinyZoo) -> None:
    engine = BlockEngine(tiny.zoo, replace(CONFIG, dtype="float16"))
    chain = tiny.chains["base"]
    with pytest.raises(ConfigurationError, match="packed matrix products"):
        engine._blocks.prepare(ChainSpan(chain, engine._reader.whole(chain)))


def test_it_is_for_the_cpu() -> None:
    with pytest.raises(ValueError, match="cpu"):
        EngineConfig(deterministic=True, device="cuda")
