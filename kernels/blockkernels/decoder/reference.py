"""Decoder layers, spelled out with the references of their parts."""

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
    cos: Tensor | None,
    sin: Tensor | None,
    layers: Sequence[tuple[LayerWeights, LayerSizes]],
    *,
    attention: BatchAttention,
    number: int,
    adapters: Sequence[Adapters],
) -> Tensor:
    """Layers one after the other.

    Semantics of a layer:
        x = norm(hidden); q, k, v = x @ qkv, plus what adapters add
        hidden += residual_scale * norm(attention(rotate(norm(q)), rotate(norm(k)), v) @ out)
        gate, up = norm(hidden) @ gate_up
        hidden += residual_scale * norm((act(gate) * up) @ down)
    where a norm or a rotation that the layer does not have changes nothing.

    Args:
        hidden: [tokens, hidden]; stays as it is.
        cos, sin: [tokens, 1, rotary_dim / 2]; None where no layer rotates.
        layers: weights and sizes of each.
        attention: the batch's requests and pages.
        number: of the first layer among those of the pages.
        adapters: of each layer.

    Returns:
        [tokens, hidden].
    """
    for offset, ((weights, sizes), added) in enumerate(zip(layers, adapters, strict=True)):
        x = _normalise(hidden, weights.input_norm, sizes)
        out = _attend(x, cos, sin, weights, sizes, attention, number + offset, added)
        hidden = hidden + _normalise(out, weights.out_norm, sizes) * sizes.residual_scale
        x = _normalise(hidden, weights.mlp_norm, sizes)
        out = _feed_forward(x, weights, sizes, added)
        hidden = hidden + _normalise(out, weights.down_norm, sizes) * sizes.residual_scale
    return hidden


def _normalise(x: Tensor, norm: Tensor | None, sizes: LayerSizes) -> Tensor:
    return x if norm is None else rms_norm_reference(x, norm, sizes.eps)


def _place(
    x: Tensor, norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, sizes: LayerSizes
) -> Tensor:
    """Queries or keys [tokens, heads, head_dim], normalised and rotated."""
    if norm is not None:
        rows = x if len(norm) == sizes.head_dim else x.flatten(1)
        x = rms_norm_reference(rows, norm, sizes.eps).view(x.shape)
    if not sizes.rotates:
        return x
    assert cos is not None
    assert sin is not None
    return rotary_reference(x, cos, sin, neighbours=sizes.neighbours)


def _attend(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    weights: LayerWeights,
    sizes: LayerSizes,
    attention: BatchAttention,
    number: int,
    added: Adapters,
) -> Tensor:
    heads = (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
    qkv = weights.qkv(x)
    first_value = (sizes.num_heads + sizes.num_kv_heads) * sizes.head_dim
    _adapt(added, LayerSlot.QUERY, x, qkv)
    _adapt(added, LayerSlot.KEY, x, qkv[:, sizes.num_heads * sizes.head_dim :])
    _adapt(added, LayerSlot.VALUE, x, qkv[:, first_value:])
    query, key, value = qkv.view(len(x), sum(heads), sizes.head_dim).split(heads, dim=1)
    query = _place(query, weights.query_norm, cos, sin, sizes)
    key = _place(key, weights.key_norm, cos, sin, sizes)
    mixed = attention(
        query, key, value, layer=number, scale=sizes.scale, window=sizes.window, softcap=sizes.softcap
    ).flatten(1)
    out = weights.out(mixed)
    _adapt(added, LayerSlot.OUT, mixed, out)
    return out


def _feed_forward(x: Tensor, weights: LayerWeights, sizes: LayerSizes, added: Adapters) -> Tensor:
    gate_up = weights.gate_up(x)
    _adapt(added, LayerSlot.GATE, x, gate_up)
    _adapt(added, LayerSlot.UP, x, gate_up[:, gate_up.shape[1] // 2 :])
    middle = gated_activation_reference(gate_up, sizes.activation)
    out = weights.down(middle)
    _adapt(added, LayerSlot.DOWN, middle, out)
    return out


def _adapt(added: Adapters, slot: LayerSlot, x: Tensor, y: Tensor) -> None:
    """Add a slot's adapters in place, to as many of the first columns of y as they have outputs."""
    if slot in added:
        _, up, _ = added[slot].adapters[0]
        add_lora_reference(y[:, : len(up)], x, added[slot].runs, added[slot].adapters)
