"""Pre-norm decoder layers, spelled out with the references of their parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from blockkernels.attention import BatchAttention
from blockkernels.decoder.layer import LayerSizes, LayerSlot, LayerWeights
from blockkernels.gated_mlp import gated_activation_reference
from blockkernels.lora import TokenRun, add_lora_reference
from blockkernels.rms_norm import rms_norm_reference
from blockkernels.rotary import rotary_reference


@dataclass(frozen=True, slots=True)
class SlotAdapters:
    """The adapters of a batch on one slot of a layer; see `add_lora_reference`."""

    runs: Sequence[TokenRun]
    adapters: Sequence[tuple[Tensor, Tensor, float]]


Adapters = Mapping[LayerSlot, SlotAdapters]
"""Those of one layer."""


def decoder_layers_reference(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    layers: Sequence[tuple[LayerWeights, LayerSizes]],
    *,
    attention: BatchAttention,
    number: int,
    adapters: Sequence[Adapters],
) -> Tensor:
    """Layers one after the other.

    Semantics of a layer:
        x = norm(hidden); q, k, v = x @ qkv, plus what adapters add
        hidden += attention(rotate(norm(q)), rotate(norm(k)), v) @ out
        gate, up = norm(hidden) @ gate_up
        hidden += (act(gate) * up) @ down

    Args:
        hidden: [tokens, hidden]; stays as it is.
        cos, sin: [tokens, 1, head_dim / 2].
        layers: weights and sizes of each.
        attention: the batch's requests and pages.
        number: of the first layer among those of the pages.
        adapters: of each layer.

    Returns:
        [tokens, hidden].
    """
    for offset, ((weights, sizes), added) in enumerate(zip(layers, adapters, strict=True)):
        x = rms_norm_reference(hidden, weights.input_norm, sizes.eps)
        hidden = hidden + _attend(x, cos, sin, weights, sizes, attention, number + offset, added)
        x = rms_norm_reference(hidden, weights.mlp_norm, sizes.eps)
        hidden = hidden + _feed_forward(x, weights, sizes, added)
    return hidden


def _attend(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: LayerWeights,
    sizes: LayerSizes,
    attention: BatchAttention,
    number: int,
    added: Adapters,
) -> Tensor:
    heads = (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
    qkv = weights.qkv(x)
    columns = qkv.split([count * sizes.head_dim for count in heads], dim=1)
    for slot, part in zip((LayerSlot.QUERY, LayerSlot.KEY, LayerSlot.VALUE), columns, strict=True):
        _adapt(added, slot, x, part)
    query, key, value = qkv.view(len(x), sum(heads), sizes.head_dim).split(heads, dim=1)
    if weights.query_norm is not None and weights.key_norm is not None:
        query = rms_norm_reference(query, weights.query_norm, sizes.eps)
        key = rms_norm_reference(key, weights.key_norm, sizes.eps)
    query, key = rotary_reference(query, cos, sin), rotary_reference(key, cos, sin)
    mixed = attention(query, key, value, layer=number, scale=sizes.scale, window=sizes.window).flatten(1)
    out = weights.out(mixed)
    _adapt(added, LayerSlot.OUT, mixed, out)
    return out


def _feed_forward(x: Tensor, weights: LayerWeights, sizes: LayerSizes, added: Adapters) -> Tensor:
    gate_up = weights.gate_up(x)
    for slot, part in zip((LayerSlot.GATE, LayerSlot.UP), gate_up.chunk(2, dim=1), strict=True):
        _adapt(added, slot, x, part)
    middle = gated_activation_reference(gate_up, sizes.activation)
    out = weights.down(middle)
    _adapt(added, LayerSlot.DOWN, middle, out)
    return out


def _adapt(added: Adapters, slot: LayerSlot, x: Tensor, y: Tensor) -> None:
    """Add a slot's adapters to y in place."""
    if slot in added:
        add_lora_reference(y, x, added[slot].runs, added[slot].adapters)
