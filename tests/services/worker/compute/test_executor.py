"""Layers in one call, where the batch's adapters allow it: the same answers as part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from blockkernels.attention import GatheredAttention
from blockkernels.backends import CpuBackend
from blockkernels.decoder import LayerSizes, LayerSlot, LayerWeights, SlotPlan
from blockkernels.decoder.reference import Adapters, SlotAdapters, decoder_layers_reference
from support.adapters import ALL_LINEAR, FURTHER_METHODS, AdapterSpec
from support.engine import EXACT_CONFIG, Ask, EngineHarness
from support.variants import VariantFactory

ONE_LAYER = AdapterSpec(
    {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": [*ALL_LINEAR],
        "layers_to_transform": [1],
        "use_dora": True,
    }
)


@dataclass
class OneLayer:
    """A layer as the reference takes it; see `blockkernels.backends.FusedLayer`."""

    weights: LayerWeights
    sizes: LayerSizes


@dataclass
class Layers:
    """Layers in one call, by the reference; notes how many each call computes."""

    layers: Sequence[OneLayer]
    calls: list[int]

    def __len__(self) -> int:
        return len(self.layers)

    def scratch_bytes(self, num_tokens: int) -> int:
        """None is needed."""
        return 0 * num_tokens

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        attention: Any,
        number: int,
        adapters: Sequence[Adapters] | None,
        scratch: Tensor,
    ) -> None:
        """See `blockkernels.backends.FusedLayers`."""
        del scratch
        self.calls.append(len(self))
        layers = [(layer.weights, layer.sizes) for layer in self.layers]
        added = adapters or [{}] * len(layers)
        hidden.copy_(
            decoder_layers_reference(
                hidden, cos, sin, layers, attention=attention, number=number, adapters=added
            )
        )


def plan(layer: SlotPlan) -> Mapping[LayerSlot, SlotAdapters]:
    """A layer's adapters as the reference takes them."""
    found = {}
    for slot, (bank, grouped) in layer.items():
        matrices = [
            (bank.down[rows.start : rows.end], bank.up[rows.start : rows.end].T, rows.scale)
            for rows in grouped._adapters
        ]
        found[slot] = SlotAdapters(grouped._runs, matrices)
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every call that computes whole layers, on every processor: how many layers."""
    made: list[int] = []
    monkeypatch.setattr(CpuBackend, "layer", lambda _, weights, sizes, dtype: OneLayer(weights, sizes))
    monkeypatch.setattr(CpuBackend, "join_layers", lambda _, layers: Layers(layers, made))
    monkeypatch.setattr(CpuBackend, "plan_adapters", lambda _, layers: [*map(plan, layers)])
    monkeypatch.setattr(CpuBackend, "attention", lambda _, *batch: GatheredAttention(*batch))
    return made


def test_shaped_adapters_are_computed_part_by_part(
    tmp_path: Path, factory: VariantFactory, calls: list[int]
) -> None:
    """Base and plain LoRA beside them get what they get alone; layers without such an adapter stay joined."""
    base = factory.checkpoint("llama-gqa-tied")
    plain, dora = factory.adapter(base, "all-linear"), factory.adapter(base, "one-layer", spec=ONE_LAYER)
    biases = factory.adapter(base, "biases", spec=FURTHER_METHODS["biases"])
    cases = {one: factory.cases(one, 4) for one in (base, plain, dora, biases)}
    config = replace(EXACT_CONFIG, prefix_sharing="off")
    with EngineHarness(tmp_path / "zoo", config) as engine:
        chains = {one: engine.load(one) for one in cases}

        def ask(*variants: Any) -> None:
            asked = [(one, case) for one in variants for case in cases[one]]
            answers = engine.run([Ask(chains[one], case.prompt, len(case.tokens)) for one, case in asked])
            assert answers == [case.tokens for _, case in asked]

        ask(base, plain)
        assert set(calls) == {4}  # all layers
        calls.clear()
        ask(base, plain, dora)
        assert set(calls) >= {1, 2}  # layer 0, layers 2 and 3
        assert calls.count(1) == calls.count(2)
        calls.clear()
        ask(biases)
        assert not calls
