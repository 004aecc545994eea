"""Decoder layers with a batch over them, in every form that one of the ways to compute takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockkernels.attention import BatchAttention, GatheredAttention
from blockkernels.backends import Backend
from blockkernels.decoder import (
    DecoderLayer,
    DecoderLayers,
    LayerAdapters,
    LayerSizes,
    LayerWeights,
    SlotAdapters,
    decoder_layers_reference,
)
from blockkernels.linear import Int8Weight, Linear, PlainLinear, linear_int8_reference, quantise_int8
from blockkernels.lora import GroupedRows, LoraBank, RowRange, TokenRun, add_lora, group_rows
from blockkernels.rotary import RopeParameters, RotaryTable, inverse_frequencies
from blockzoo.compute.decoder import PRE_NORMS, SLOTS, LayerBlock
from blockzoo.compute.stored import int8_weight, is_quantised

CPU = torch.device("cpu")
PAGE_TOKENS, NUM_LAYERS, FIRST = 7, 3, 1
"""The layers computed are FIRST .. of so many in the pages."""


@dataclass(frozen=True)
class Case:
    """Sizes of layers and what they have.

    Attributes:
        norms: place -> module, as a layer's config has it; None for Llama's.
        norm_kind: as in `blockzoo.compute.parts.Norms`.
        rope: entries of a layer's rope config; None for a layer without positions.
        details: more entries of a layer's config.
        fused: queries, keys and values are one matrix, and gate and up.
        int8: modules whose weights are quantised; None for none.
        requests: keys with the new ones, and new tokens, of each.
    """

    hidden: int = 48
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    wide: int = 70
    window: int | None = None
    head_norms: bool | str = False
    norms: dict[str, str] | None = None
    norm_kind: str = "rounded"
    rope: dict[str, Any] | None = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    fused: bool = False
    biases: bool = False
    adapters: bool = False
    activation: str = "silu"
    int8: str | None = None
    dtype: torch.dtype = torch.bfloat16
    requests: tuple[tuple[int, int], ...] = ((1, 1), (13, 13), (40, 1), (66, 33))

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.requests)


POST_NORMS = {"attention_output": "after_attention", "mlp_output": "after_mlp"}
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
    "gelu by tanh": Case(activation="gelu_pytorch_tanh"),
    "post norms": Case(
        norms=POST_NORMS, norm_kind="wide", head_norms="projection", rope={"angles": "float32"}
    ),
    "sandwich": Case(norms=POST_NORMS | PRE_NORMS, norm_kind="centred", head_norms=True, adapters=True),
    "no positions": Case(rope=None, head_norms=True),
    "no positions, no norms": Case(rope=None, adapters=True),
    "neighbours": Case(rope={"pairs": "neighbours", "rotary_dim": 4}),
    "many neighbours": Case(head_dim=46, rope={"pairs": "neighbours", "angles": "float32", "rotary_dim": 42}),
    "a part of a head": Case(head_dim=38, rope={"rotary_dim": 34}, head_norms="projection"),
    "fused matrices": Case(fused=True, adapters=True, biases=True),
    "scales": Case(details={"attention_scale": "0.2", "residual_scale": "0.4"}),
    "soft cap": Case(details={"attention_softcap": "1.5"}, window=9),
    "int8": Case(hidden=64, heads=4, head_dim=16, wide=128, int8="", biases=True, adapters=True),
    "int8, one token": Case(hidden=192, heads=2, head_dim=32, wide=64, int8="", requests=((9, 1),)),
    "int8 of the feed-forward part": Case(hidden=128, wide=320, int8="mlp.", fused=True),
    "int8, all else": Case(
        hidden=64, heads=8, kv_heads=1, head_dim=24, wide=192, norms=POST_NORMS | PRE_NORMS,
        norm_kind="centred", head_norms=True, activation="gelu_pytorch_tanh", fused=True, int8="",
        adapters=True,
    ),
    "everything new": Case(
        hidden=34, heads=6, kv_heads=3, head_dim=10, window=9, norms=POST_NORMS | PRE_NORMS,
        norm_kind="centred", head_norms=True, activation="gelu_pytorch_tanh", fused=True, adapters=True,
        rope={"pairs": "neighbours", "rotary_dim": 6},
        details={"attention_softcap": "2.5", "attention_scale": "0.3", "residual_scale": "0.7"},
    ),
}  # fmt: skip


class Layers:
    """Two layers with a batch over them, in every form that one of the ways to compute takes."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(1)
        self.case = case
        rope = case.rope or {}
        self.rope = RopeParameters(
            rope.get("rotary_dim", case.head_dim), 10000.0, neighbours="pairs" in rope, wide="angles" in rope
        )
        details = {name: float(value) for name, value in case.details.items()}
        self.sizes = LayerSizes(
            case.hidden, case.heads, case.kv_heads, case.head_dim, case.window, 1e-5,
            details.get("attention_scale", case.head_dim**-0.5), case.activation,
            details.get("attention_softcap"), details.get("residual_scale", 1.0), case.rope is not None,
            self.rope.neighbours,
        )  # fmt: skip
        self.tensors = [self._tensors() for _ in range(2)]
        self.hidden = self._random(case.num_tokens, case.hidden)
        self.runs, self.adapters = self._adapters() if case.adapters else ([], {})
        starts = [length - count for length, count in case.requests]
        positions = [
            at for start, (end, _) in zip(starts, case.requests, strict=True) for at in range(start, end)
        ]
        table = RotaryTable(inverse_frequencies(self.rope), self.rope.table_dtype(case.dtype))
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
        inputs = {
            "self_attn.q_proj": query, "self_attn.k_proj": kv, "self_attn.v_proj": kv,
            "mlp.gate_proj": case.wide, "mlp.up_proj": case.wide,
        }  # fmt: skip
        if case.fused:
            inputs = {"self_attn.qkv_proj": query + 2 * kv, "mlp.gate_up_proj": 2 * case.wide}
        return {
            **{module: (outer, case.hidden) for module, outer in inputs.items()},
            "self_attn.o_proj": (case.hidden, query),
            "mlp.down_proj": (case.hidden, case.wide),
        }

    def _tensors(self) -> dict[str, Tensor]:
        """A layer's tensors as a checkpoint names them."""
        case = self.case
        neutral = 0 if case.norm_kind == "centred" else 1
        found = {
            f"{name}.weight": neutral + self._random(case.hidden, scale=0.1)
            for name in (PRE_NORMS if case.norms is None else case.norms).values()
        }
        for module, (outer, inner) in self._module_shapes().items():
            weight = self._random(outer, inner, scale=inner**-0.5)
            if case.int8 is not None and module.startswith(case.int8):
                quantised = quantise_int8(weight)
                found[f"{module}.int8"], found[f"{module}.int8_scale"] = quantised.values, quantised.scales
            else:
                found[f"{module}.weight"] = weight
            if case.biases:
                found[f"{module}.bias"] = self._random(outer, scale=0.1)
        if case.head_norms:
            for name, heads in (("q_norm", case.heads), ("k_norm", case.kv_heads)):
                size = case.head_dim * (heads if case.head_norms == "projection" else 1)
                found[f"self_attn.{name}.weight"] = neutral + self._random(size, scale=0.1)
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
            "head_dim": case.head_dim, "norm": {"eps": "1e-5", "kind": case.norm_kind},
            "activation": case.activation, "sliding_window": case.window, **case.details,
            "rope": None if case.rope is None
            else {"type": "default", "theta": self.rope.theta, **case.rope},
        }  # fmt: skip
        if case.norms is not None:
            config["norms"] = case.norms
        return LayerBlock(config, self.tensors[number], backend, exact=True)

    def weights(self, number: int, linear: Any, int8: Any) -> LayerWeights:
        """A layer in the words of the kernels; `linear` and `int8` lay out a weight and a bias."""
        tensors = self.tensors[number]
        names = list(self._module_shapes())
        qkv, gate_up = (names[:1], names[1:2]) if self.case.fused else (names[:3], names[3:5])
        places = PRE_NORMS if self.case.norms is None else self.case.norms

        def norm(module: str | None) -> Tensor | None:
            stored = tensors.get(f"{module}.weight")
            if stored is None or self.case.norm_kind == "rounded":
                return stored
            return stored.float() + (1 if self.case.norm_kind == "centred" else 0)

        def joined(*modules: str) -> Linear:
            biases = [tensors.get(f"{module}.bias") for module in modules]
            bias = torch.cat([one for one in biases if one is not None]) if self.case.biases else None
            if is_quantised(tensors, modules[0]):
                made: Linear = int8(int8_weight(tensors, modules), bias)
            else:
                made = linear(torch.cat([tensors[f"{module}.weight"] for module in modules]), bias)
            return made

        return LayerWeights(
            norm(places.get("attention_input")),
            norm(places.get("mlp_input")),
            norm("self_attn.q_norm"),
            norm("self_attn.k_norm"),
            joined(*qkv),
            joined("self_attn.o_proj"),
            joined(*gate_up),
            joined("mlp.down_proj"),
            norm(places.get("attention_output")),
            norm(places.get("mlp_output")),
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
        layers = [(self.weights(number, PlainLinear, PlainInt8), self.sizes) for number in range(2)]
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
        return self._run(layers, backend, LayerAdapters)

    def by_backend(self, backend: Backend) -> Tensor:
        """All layers in one call, as the backend has it."""
        kernels = [backend.layer(one, self.sizes, self.case.dtype) for one in self.packed(backend)]
        layers = backend.join_layers([kernel for kernel in kernels if kernel is not None])
        assert len(layers) == 2
        return self._run(layers, backend, backend.plan_adapters)

    def _run(self, layers: Any, backend: Backend, plan_adapters: Any) -> Tensor:
        hidden = self.hidden.clone()
        plan = {SLOTS[name]: one for name, one in self.planned().items()}
        layers(
            hidden, self.cos, self.sin, attention=self.attention(backend), number=FIRST,
            adapters=plan_adapters([plan, plan]) if plan else None,
            scratch=backend.scratch(layers.scratch_bytes(len(hidden))),
        )  # fmt: skip
        return hidden

    def packed(self, backend: Backend) -> Sequence[LayerWeights]:
        """Weights as the backend lays them out."""
        return [
            self.weights(
                number, lambda weight, bias: backend.linear(weight, bias, exact=True), backend.linear_int8
            )
            for number in range(2)
        ]


class PlainInt8:
    """A quantised layer by its reference."""

    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self.out_features, self.in_features = weight.values.shape
        self.num_bytes = weight.values.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return linear_int8_reference(x, self._weight, self._bias)


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

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return self._attention(query, key, value, layer=self.number, **options)

    def adapt(self, module: str, x: Tensor, y: Tensor) -> None:
        if module in self._planned:
            add_lora(y, x, *self._planned[module])
