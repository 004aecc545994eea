"""Decoder layers: the reference, a block that computes part by part, and the C kernel, against each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from blockkernels.attention import BatchAttention, GatheredAttention
from blockkernels.backends import Backend, CpuBackend, ReferenceBackend
from blockkernels.decoder import (
    DecoderLayer,
    DecoderLayers,
    LayerAdapters,
    LayerSizes,
    LayerSlot,
    LayerWeights,
    SlotAdapters,
    decoder_layers_reference,
)
from blockkernels.linear import Linear, PlainLinear
from blockkernels.lora import GroupedRows, LoraBank, RowRange, TokenRun, add_lora, group_rows
from blockkernels.native import library
from blockkernels.rotary import RopeParameters, RotaryTable, inverse_frequencies
from blockzoo.compute.decoder import SLOTS, LayerBlock

CPU = torch.device("cpu")
PAGE_TOKENS, NUM_LAYERS, FIRST = 7, 3, 1
"""The layers computed are FIRST .. of so many in the pages."""
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Of the largest value. In bfloat16 each of a dozen roundings of a layer may fall the other way."""


@dataclass(frozen=True)
class Case:
    """Sizes of layers and what they have.

    Attributes:
        requests: keys with the new ones, and new tokens, of each.
    """

    hidden: int = 48
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    wide: int = 70
    window: int | None = None
    head_norms: bool = False
    biases: bool = False
    adapters: bool = False
    activation: str = "silu"
    dtype: torch.dtype = torch.bfloat16
    requests: tuple[tuple[int, int], ...] = ((1, 1), (13, 13), (40, 1), (66, 33))

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.requests)


CASES = {
    "plain": Case(),
    "one token": Case(requests=((1, 1),)),
    "odd sizes": Case(hidden=50, heads=3, kv_heads=1, head_dim=22, wide=126),
    "head norms": Case(head_norms=True),
    "window": Case(window=20),
    "biases": Case(biases=True),
    "adapters": Case(adapters=True),
    "all": Case(
        hidden=34, heads=6, kv_heads=3, head_dim=10, window=9, head_norms=True, biases=True, adapters=True
    ),
    "gelu": Case(activation="gelu", adapters=True),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Layers:
    """Two layers with a batch over them, in every form that one of the ways to compute takes."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(1)
        self.case = case
        self.rope = RopeParameters(case.head_dim, 10000.0)
        self.sizes = LayerSizes(
            case.hidden, case.heads, case.kv_heads, case.head_dim, case.window, 1e-5, case.head_dim**-0.5,
            case.activation,
        )  # fmt: skip
        self.tensors = [self._tensors() for _ in range(2)]
        self.hidden = self._random(case.num_tokens, case.hidden)
        self.runs, self.adapters = self._adapters() if case.adapters else ([], {})
        starts = [length - count for length, count in case.requests]
        positions = [
            at for start, (end, _) in zip(starts, case.requests, strict=True) for at in range(start, end)
        ]
        table = RotaryTable(inverse_frequencies(self.rope), case.dtype)
        self.cos, self.sin = table.at(torch.tensor(positions), 1 + max(positions))
        widths = [-(-length // PAGE_TOKENS) for length, _ in case.requests]
        pages = np.random.default_rng(0).permutation(NUM_LAYERS * sum(widths))
        ends = np.cumsum([NUM_LAYERS * width for width in widths])
        self.tables = [part.reshape(NUM_LAYERS, -1) for part in np.split(pages, ends[:-1])]
        size = (len(pages) * PAGE_TOKENS, case.kv_heads, case.head_dim)
        self.pool = torch.randn(2, *size).to(case.dtype)

    def _random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * scale).to(self.case.dtype)

    def _module_shapes(self) -> dict[str, tuple[int, int]]:
        case = self.case
        query, kv = case.heads * case.head_dim, case.kv_heads * case.head_dim
        shapes = {
            LayerSlot.QUERY: (query, case.hidden), LayerSlot.KEY: (kv, case.hidden),
            LayerSlot.VALUE: (kv, case.hidden), LayerSlot.OUT: (case.hidden, query),
            LayerSlot.GATE: (case.wide, case.hidden), LayerSlot.UP: (case.wide, case.hidden),
            LayerSlot.DOWN: (case.hidden, case.wide),
        }  # fmt: skip
        return {module: shapes[slot] for module, slot in SLOTS.items()}

    def _tensors(self) -> dict[str, Tensor]:
        """A layer's tensors as a checkpoint names them."""
        case = self.case
        found = {name: 1 + self._random(case.hidden, scale=0.1)
                 for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}  # fmt: skip
        for module, (outer, inner) in self._module_shapes().items():
            found[f"{module}.weight"] = self._random(outer, inner, scale=inner**-0.5)
            if case.biases:
                found[f"{module}.bias"] = self._random(outer, scale=0.1)
        if case.head_norms:
            for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
                found[name] = 1 + self._random(case.head_dim, scale=0.1)
        return found

    def _adapters(self) -> tuple[list[TokenRun], dict[str, list[tuple[Tensor, Tensor, float]]]]:
        """Two adapters on every module, one token with both where there are several."""
        tokens = self.case.num_tokens
        runs = [TokenRun(0, 1 + tokens // 2, 0), TokenRun(tokens // 2, tokens, 1)]
        return runs, {
            module: [
                (self._random(rank, inner, scale=inner**-0.5), self._random(outer, rank, scale=0.2), scale)
                for rank, scale in ((3, 0.5), (8, 0.25))
            ]
            for module, (outer, inner) in self._module_shapes().items()
        }

    def block(self, number: int, backend: Backend) -> LayerBlock:
        case = self.case
        config: dict[str, Any] = {
            "hidden_size": case.hidden, "num_heads": case.heads, "num_kv_heads": case.kv_heads,
            "head_dim": case.head_dim, "norm_eps": 1e-5, "activation": case.activation,
            "sliding_window": case.window, "rope": {"type": "default", "theta": self.rope.theta},
        }  # fmt: skip
        return LayerBlock(config, self.tensors[number], backend, exact=True)

    def weights(self, number: int, linear: Any) -> LayerWeights:
        """A layer in the words of the kernels; `linear` lays out a weight and a bias."""
        tensors = self.tensors[number]
        names = list(SLOTS)

        def joined(*modules: str) -> Linear:
            biases = [tensors.get(f"{module}.bias") for module in modules]
            bias = torch.cat([one for one in biases if one is not None]) if self.case.biases else None
            made: Linear = linear(torch.cat([tensors[f"{module}.weight"] for module in modules]), bias)
            return made

        return LayerWeights(
            tensors["input_layernorm.weight"],
            tensors["post_attention_layernorm.weight"],
            tensors.get("self_attn.q_norm.weight"),
            tensors.get("self_attn.k_norm.weight"),
            joined(*names[:3]),
            joined(names[3]),
            joined(*names[4:6]),
            joined(names[6]),
        )

    def attention(self, backend: Backend | None = None) -> BatchAttention:
        """Over pages of its own, with the same content each time."""
        keys, values = self.pool.clone()
        lengths, counts = zip(*self.case.requests, strict=True)
        made = GatheredAttention if backend is None else backend.attention
        return made(keys, values, PAGE_TOKENS, self.tables, lengths, counts)

    def planned(self) -> dict[str, tuple[LoraBank, GroupedRows]]:
        """The adapters in banks, by module."""
        found = {}
        for module, adapters in self.adapters.items():
            bank = LoraBank(adapters[0][0].shape[1], adapters[0][1].shape[0], self.case.dtype, CPU)
            rows: list[RowRange] = [bank.add(*adapter) for adapter in adapters]
            found[module] = bank, group_rows(self.runs, rows, bank.down, exact=True)
        return found

    def reference(self) -> Tensor:
        """All layers as spelled out."""
        slots = {SLOTS[name]: SlotAdapters(self.runs, one) for name, one in self.adapters.items()}
        layers = [(self.weights(number, PlainLinear), self.sizes) for number in range(2)]
        return decoder_layers_reference(
            self.hidden, self.cos, self.sin, layers, attention=self.attention(), number=FIRST,
            adapters=[slots, slots],
        )  # fmt: skip

    def by_parts(self, backend: Backend) -> Tensor:
        """All layers as blocks compute them without a kernel for a whole layer."""
        context = Context(self, self.attention(backend))
        hidden = self.hidden
        for number in range(2):
            context.number = FIRST + number
            hidden = self.block(number, backend)(hidden, context)
        return hidden

    def in_one_call(self, backend: Backend) -> Tensor:
        """All layers by the C kernel."""
        layers = DecoderLayers([DecoderLayer(one, self.sizes) for one in self.packed(backend)])
        hidden = self.hidden.clone()
        plan = {SLOTS[name]: one for name, one in self.planned().items()}
        layers(
            hidden, self.cos, self.sin, attention=self.attention(backend), number=FIRST,
            adapters=LayerAdapters([plan, plan]) if plan else None,
            scratch=backend.scratch(layers.scratch_bytes(len(hidden))),
        )  # fmt: skip
        return hidden

    def packed(self, backend: Backend) -> Sequence[LayerWeights]:
        """Weights as the backend lays them out."""
        return [
            self.weights(number, lambda weight, bias: backend.linear(weight, bias, exact=True))
            for number in range(2)
        ]


class Context:
    """What a block asks while it computes; see `BlockContext`."""

    def __init__(self, layers: Layers, attention: BatchAttention) -> None:
        self.number = 0
        self._layers = layers
        self._attention = attention
        self._planned = layers.planned()

    def rotary(self, rope: RopeParameters) -> tuple[Tensor, Tensor]:
        assert rope == self._layers.rope
        return self._layers.cos, self._layers.sin

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        return self._attention(query, key, value, layer=self.number, scale=scale, window=window)

    def adapt(self, module: str, x: Tensor, y: Tensor) -> None:
        if module in self._planned:
            add_lora(y, x, *self._planned[module])


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def assert_near(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    difference = (got.double() - want.double()).abs().max()
    assert difference <= TOLERANCE[got.dtype] * want.double().abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", [CpuBackend(), ReferenceBackend(CPU)], ids=["cpu", "reference"])
@cases
def test_a_block_by_its_parts_is_the_reference(case: Case, backend: Backend, dtype: torch.dtype) -> None:
    layers = Layers(replace(case, dtype=dtype))
    assert_near(layers.by_parts(backend), layers.reference())


@cases
def test_the_kernel_is_the_reference_with_the_bits_of_the_parts(case: Case) -> None:
    layers, backend = Layers(case), CpuBackend()
    if not all(DecoderLayer.can_compute(one, layers.sizes) for one in layers.packed(backend)):
        pytest.skip("there is no kernel for this layer on this machine")
    got = layers.in_one_call(backend)
    assert torch.equal(got, layers.by_parts(backend))
    assert_near(got, layers.reference())


@cases
def test_which_layers_have_a_kernel(case: Case) -> None:
    """Where the processor multiplies pairs of bfloat16: SiLU, and weights with an even number of inputs."""
    native = library()
    has_pairs = native is not None and native.linear_panel > 0
    for dtype in TOLERANCE:
        layers = Layers(replace(case, dtype=dtype))
        expected = has_pairs and dtype == torch.bfloat16 and case.activation == "silu"
        for number in range(2):
            assert (layers.block(number, CpuBackend()).kernel is not None) == expected
            assert layers.block(number, ReferenceBackend(CPU)).kernel is None


def test_odd_weights_have_no_kernel() -> None:
    layers, backend = Layers(Case(wide=71)), CpuBackend()
    assert not any(DecoderLayer.can_compute(one, layers.sizes) for one in layers.packed(backend))


def test_the_reference_leaves_its_input_and_stores_keys_and_values() -> None:
    layers = Layers(Case(requests=((9, 4), (3, 3))))
    before, keys = layers.hidden.clone(), layers.pool[0].clone()
    layers.pool = torch.full_like(layers.pool, float("nan"))
    layers.pool[0], layers.pool[1] = keys, keys  # what came before is known
    result = layers.reference()
    assert torch.equal(layers.hidden, before)
    assert result.isfinite().all()


def test_adapters_and_sizes_change_the_result() -> None:
    """No two cases are alike by mistake: each setting is seen in the reference."""
    plain = Layers(Case(requests=((30, 30),))).reference()
    for change in ({"adapters": True}, {"window": 5}, {"head_norms": True}, {"biases": True}):
        assert not torch.equal(Layers(Case(requests=((30, 30),), **change)).reference(), plain)  # type: ignore[arg-type]
