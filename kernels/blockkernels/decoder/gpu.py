"""Decoder layers by Triton: a fixed sequence of launches for a batch, with no work of torch between them.

A layer of a decode step takes ten launches: four products (one launch more for each whose inputs are split),
one that places queries, keys and values, two for attention and the sum of its parts, one for the gated
activation, and two sums with the norms around them. Prompts in the batch add one, for their attention.
Adapters add two for each of the layer's four inputs that a module with adapters reads, however many adapters
there are. The first of several layers adds one, its norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from blockkernels.attention import BatchAttention
from blockkernels.attention.gpu import TritonAttention
from blockkernels.decoder.kernel import SlotPlan
from blockkernels.decoder.layer import LayerSizes, LayerSlot, LayerWeights
from blockkernels.gated_mlp.gpu import gated_activation_gpu
from blockkernels.lora.gpu import LoraTable, Place, add_tables, lora_tables
from blockkernels.rms_norm.gpu import add_norm
from blockkernels.rotary.gpu import place_heads

_INPUTS = (
    (LayerSlot.QUERY, LayerSlot.KEY, LayerSlot.VALUE),
    (LayerSlot.OUT,),
    (LayerSlot.GATE, LayerSlot.UP),
    (LayerSlot.DOWN,),
)
"""Slots that read the same input."""


class TritonAdapters:
    """The adapters of a batch on some layers; they may serve many passes."""

    def __init__(self, layers: Sequence[SlotPlan], device: torch.device) -> None:
        """Take the banks of each layer's slots that have adapters in the batch; banks must not change."""
        self._layers = layers
        self._device = device
        self._tables: list[list[LoraTable]] = []

    def on(self, columns: Sequence[Mapping[LayerSlot, int]]) -> Sequence[Sequence[LoraTable]]:
        """Tables of the four inputs of each layer, one layer after the other.

        Args:
            columns: of each layer, the first column of each slot's outputs; always the same.
        """
        if not self._tables:
            inputs: list[list[Place]] = [
                [(*plan[slot], firsts[slot]) for slot in slots if slot in plan]
                for plan, firsts in zip(self._layers, columns, strict=True)
                for slots in _INPUTS
            ]
            self._tables = lora_tables(inputs, self._device)
        return self._tables


class TritonLayer:
    """One layer, its weights laid out by the same backend.

    Attributes:
        weights, sizes: of the layer.
    """

    def __init__(self, weights: LayerWeights, sizes: LayerSizes) -> None:
        """Take a layer."""
        self.weights = weights
        self.sizes = sizes


class TritonLayers:
    """Layers of equal sizes, one after the other; see the module."""

    def __init__(self, layers: Sequence[TritonLayer]) -> None:
        """Take at least one layer, in the order in which they compute."""
        assert len({layer.sizes for layer in layers}) == 1
        self._layers = [layer.weights for layer in layers]
        self._sizes = layers[0].sizes
        self._columns = [_columns(layer.weights, layer.sizes) for layer in layers]

    def __len__(self) -> int:
        return len(self._layers)

    def scratch_bytes(self, num_tokens: int) -> int:
        """None: torch's allocator keeps what a batch needs."""
        del num_tokens
        return 0

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        *,
        attention: BatchAttention,
        number: int,
        adapters: TritonAdapters | None,
        scratch: Tensor,
    ) -> None:
        """See `blockkernels.backends.base.FusedLayers`."""
        del scratch
        assert isinstance(attention, TritonAttention)
        sizes = self._sizes
        if not sizes.rotates:
            cos = sin = None
        elif cos is not None and sin is not None:
            cos, sin = cos.contiguous(), sin.contiguous()
        tables = None if adapters is None else adapters.on(self._columns)
        norms = [weights.input_norm for weights in self._layers[1:]] + [None]
        x = add_norm(hidden, None, following=self._layers[0].input_norm, eps=sizes.eps)
        for offset, (weights, following) in enumerate(zip(self._layers, norms, strict=True)):
            added = tables[4 * offset : 4 * offset + 4] if tables is not None else ((),) * 4
            out = _attend(x, cos, sin, weights, sizes, attention, number + offset, added)
            x = add_norm(
                hidden, out, post=weights.out_norm, scale=sizes.residual_scale, following=weights.mlp_norm,
                eps=sizes.eps,
            )  # fmt: skip
            gate_up = weights.gate_up(x)
            add_tables(gate_up, x, added[2])
            middle = gated_activation_gpu(gate_up, sizes.activation)
            out = weights.down(middle)
            add_tables(out, middle, added[3])
            x = add_norm(
                hidden, out, post=weights.down_norm, scale=sizes.residual_scale, following=following,
                eps=sizes.eps,
            )  # fmt: skip


def _columns(weights: LayerWeights, sizes: LayerSizes) -> Mapping[LayerSlot, int]:
    """First column of each slot's outputs."""
    query, kv = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    return {
        LayerSlot.QUERY: 0,
        LayerSlot.KEY: query,
        LayerSlot.VALUE: query + kv,
        LayerSlot.OUT: 0,
        LayerSlot.GATE: 0,
        LayerSlot.UP: weights.down.in_features,
        LayerSlot.DOWN: 0,
    }


def _attend(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    weights: LayerWeights,
    sizes: LayerSizes,
    attention: TritonAttention,
    number: int,
    added: Sequence[Sequence[LoraTable]],
) -> Tensor:
    qkv = weights.qkv(x)
    add_tables(qkv, x, added[0])
    query = place_heads(
        qkv, cos, sin, attention.slots(number), attention.pool_keys, attention.pool_values,
        num_heads=sizes.num_heads, query_norm=weights.query_norm, key_norm=weights.key_norm, eps=sizes.eps,
        neighbours=sizes.neighbours,
    )  # fmt: skip
    mixed = attention.attend(
        query, layer=number, scale=sizes.scale, window=sizes.window, softcap=sizes.softcap
    ).flatten(1)
    out = weights.out(mixed)
    add_tables(out, mixed, added[1])
    return out
