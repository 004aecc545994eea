"""How the blocks of the pre-norm decoder families compute.

One implementation serves Llama, Mistral, Qwen2 and Qwen3, because what differs
between them (biases, query/key norm, rotary scaling, sliding window) is told by
a block's config and tensors. Only this module, `blockzoo.evaluation.forward` and
`measure` need torch, and they are imported when something is computed, not before.

A block sees a flat batch: the tokens of all requests below each other, of
whatever variant. What depends on the request (its keys and values, its
adapters) is behind `BlockContext`, which the engine implements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from blockkernels.decoder import DecoderLayer, LayerSizes, LayerWeights
from blockkernels.gated_mlp import gated_activation
from blockkernels.linear import PackedLinear
from blockkernels.rms_norm import rms_norm
from blockkernels.rotary import RopeParameters, rotary
from blockzoo.errors import InvalidConfigError
from blockzoo.manifest import BlockKind, BlockManifest, JsonValue

ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP_INPUTS = ("mlp.gate_proj", "mlp.up_proj")
HEAD_MODULE = "lm_head"


class BlockContext(Protocol):
    """What a block asks of the engine while it computes one batch at one position of the chain."""

    def rotary(self, rope: RopeParameters) -> tuple[Tensor, Tensor]:
        """Cosine and sine for the batch's positions, each [tokens, 1, head_dim / 2]."""
        ...

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """Store key and value [tokens, kv_heads, head_dim], attend, return [tokens, heads, head_dim]."""
        ...

    def adapt(self, module: str, x: Tensor, y: Tensor) -> None:
        """Add the adapters on `module` to y [tokens, out] in place, given its input x [tokens, in]."""
        ...


class EmbeddingBlock:
    """Token ids to hidden states."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._weight = tensors["weight"]
        self.num_bytes = self._weight.nbytes
        self.hidden_size = self._weight.shape[1]
        self.module_shapes: dict[str, tuple[int, int]] = {}

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Shape: token_ids int64 [tokens], result [tokens, hidden]."""
        return functional.embedding(token_ids, self._weight)


class LayerBlock:
    """One pre-norm decoder layer: grouped-query attention and a gated feed-forward part.

    Query, key and value (and gate and up) are one matrix in memory, so a batch
    reads its input once.

    Attributes:
        kernel: computes the whole layer in one call, bit for bit as the call of this block does part by
            part; None where there is no such kernel.
    """

    def __init__(
        self, config: Mapping[str, JsonValue], tensors: Mapping[str, Tensor], *, exact: bool = False
    ) -> None:
        self.hidden_size = _integer(config, "hidden_size")
        self.num_heads = _integer(config, "num_heads")
        self.num_kv_heads = _integer(config, "num_kv_heads")
        self.head_dim = _integer(config, "head_dim")
        self.window = None if config.get("sliding_window") is None else _integer(config, "sliding_window")
        self.rope = rope_parameters(config)
        self._eps = _real(config, "norm_eps")
        self._activation = str(config["activation"])
        self._exact = exact
        self._scale = self.head_dim**-0.5
        self._input_norm = tensors["input_layernorm.weight"]
        self._mlp_norm = tensors["post_attention_layernorm.weight"]
        self._query_norm = tensors.get("self_attn.q_norm.weight")
        self._key_norm = tensors.get("self_attn.k_norm.weight")
        self._qkv = _fused(tensors, ATTENTION_INPUTS, exact)
        self._out = _fused(tensors, ("self_attn.o_proj",), exact)
        self._gate_up = _fused(tensors, MLP_INPUTS, exact)
        self._down = _fused(tensors, ("mlp.down_proj",), exact)
        norms = (self._input_norm, self._mlp_norm, self._query_norm, self._key_norm)
        linears = (self._qkv, self._out, self._gate_up, self._down)
        self.num_bytes = sum(norm.nbytes for norm in norms if norm is not None) + sum(
            linear.num_bytes for linear in linears
        )
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        wide = self._down.in_features
        self._columns = {
            "self_attn.q_proj": slice(0, query),
            "self_attn.k_proj": slice(query, query + kv),
            "self_attn.v_proj": slice(query + kv, query + 2 * kv),
            "mlp.gate_proj": slice(0, wide),
            "mlp.up_proj": slice(wide, 2 * wide),
        }
        self.module_shapes = {
            **{name: (part.stop - part.start, self.hidden_size) for name, part in self._columns.items()},
            "self_attn.o_proj": (self.hidden_size, query),
            "mlp.down_proj": (self.hidden_size, wide),
        }
        self.kernel = self._as_one_call()

    def __call__(self, hidden: Tensor, context: BlockContext) -> Tensor:
        """Shape: hidden [tokens, hidden_size], result likewise (a new tensor)."""
        hidden = hidden + self._attention(rms_norm(hidden, self._input_norm, self._eps), context)
        return hidden.add_(self._feed_forward(rms_norm(hidden, self._mlp_norm, self._eps), context))

    def _as_one_call(self) -> DecoderLayer | None:
        """The C kernel of a whole layer, where there is one for these weights."""
        norms = (self._input_norm, self._mlp_norm, self._query_norm, self._key_norm)
        weights = LayerWeights(*norms, self._qkv, self._out, self._gate_up, self._down)
        if self._activation != "silu" or not DecoderLayer.can_compute(weights):
            return None
        heads = (self.num_heads, self.num_kv_heads, self.head_dim)
        sizes = LayerSizes(self.hidden_size, *heads, self.window, self._eps, self._scale)
        return DecoderLayer(weights, sizes)

    def _attention(self, x: Tensor, context: BlockContext) -> Tensor:
        tokens = x.shape[0]
        qkv = self._qkv(x)
        self._adapt(ATTENTION_INPUTS, x, qkv, context)
        heads, kv_heads = self.num_heads, self.num_kv_heads
        states = qkv.view(tokens, heads + 2 * kv_heads, self.head_dim)
        cos, sin = context.rotary(self.rope)
        if self._query_norm is not None and self._key_norm is not None:
            query = rotary(rms_norm(states[:, :heads], self._query_norm, self._eps), cos, sin)
            key = states[:, heads : heads + kv_heads]
            key = rotary(rms_norm(key, self._key_norm, self._eps), cos, sin)
        else:
            rotated = rotary(states[:, : heads + kv_heads], cos, sin)
            query, key = rotated[:, :heads], rotated[:, heads:]
        value = states[:, heads + kv_heads :]
        mixed = context.attend(query, key, value, scale=self._scale, window=self.window)
        mixed = mixed.reshape(tokens, heads * self.head_dim)
        out = self._out(mixed)
        context.adapt("self_attn.o_proj", mixed, out)
        return out

    def _feed_forward(self, x: Tensor, context: BlockContext) -> Tensor:
        gate_up = self._gate_up(x)
        self._adapt(MLP_INPUTS, x, gate_up, context)
        middle = gated_activation(gate_up, self._activation, exact=self._exact)
        out = self._down(middle)
        context.adapt("mlp.down_proj", middle, out)
        return out

    def _adapt(self, modules: tuple[str, ...], x: Tensor, y: Tensor, context: BlockContext) -> None:
        for module in modules:
            context.adapt(module, x, y[:, self._columns[module]])


class HeadBlock:
    """Final norm and projection to the vocabulary."""

    def __init__(
        self, config: Mapping[str, JsonValue], tensors: Mapping[str, Tensor], *, exact: bool = False
    ) -> None:
        self._eps = _real(config, "norm_eps")
        self._norm = tensors["norm.weight"]
        self._lm_head = _fused(tensors, (HEAD_MODULE,), exact)
        self.hidden_size = self._norm.shape[0]
        self.vocab_size = self._lm_head.out_features
        self.num_bytes = self._norm.nbytes + self._lm_head.num_bytes
        self.module_shapes = {HEAD_MODULE: (self.vocab_size, self.hidden_size)}

    def __call__(self, hidden: Tensor, context: BlockContext) -> Tensor:
        """Shape: hidden [rows, hidden_size], result logits [rows, vocab] in the block's dtype."""
        x = rms_norm(hidden, self._norm, self._eps)
        logits = self._lm_head(x)
        context.adapt(HEAD_MODULE, x, logits)
        return logits


ExecutableBlock = EmbeddingBlock | LayerBlock | HeadBlock
"""A base block in memory, ready to compute."""


def build_block(
    manifest: BlockManifest, tensors: Mapping[str, Tensor], *, exact: bool = False
) -> ExecutableBlock:
    """Make a base block executable; matrices are laid out for the device they are on.

    Args:
        manifest: says kind and config.
        tensors: the block's tensors by name, all of one dtype, on the target device.
        exact: a token's result must not depend, in any bit, on the tokens computed with it. Holds with the
            C kernels and packed weights only; who asks for it checks that they are there.

    Raises:
        InvalidConfigError: the kind is not executable, or config and tensors do not fit.
    """
    try:
        if manifest.kind == BlockKind.EMBEDDING:
            return EmbeddingBlock(tensors)
        if manifest.kind == BlockKind.LAYER:
            return LayerBlock(manifest.config, tensors, exact=exact)
        if manifest.kind == BlockKind.HEAD:
            return HeadBlock(manifest.config, tensors, exact=exact)
    except KeyError as error:
        raise InvalidConfigError(f"{manifest.kind} block lacks {error}", family=manifest.family) from error
    raise InvalidConfigError(
        f"blocks of kind {manifest.kind!r} cannot be run by this version",
        hint="Upgrade blockzoo on this machine.",
        kind=manifest.kind,
    )


def rope_parameters(config: Mapping[str, JsonValue]) -> RopeParameters:
    """Rotary parameters of a layer's config.

    Raises:
        InvalidConfigError: a value is missing or no number.
    """
    rope = config.get("rope")
    if not isinstance(rope, dict):
        raise InvalidConfigError("layer config has no rope parameters")
    kind = str(rope["type"])
    if kind == "default":
        return RopeParameters(_integer(config, "head_dim"), _real(rope, "theta"))
    if kind == "linear":
        return RopeParameters(
            _integer(config, "head_dim"), _real(rope, "theta"), kind, factor=_real(rope, "factor")
        )
    return RopeParameters(
        _integer(config, "head_dim"),
        _real(rope, "theta"),
        kind,
        factor=_real(rope, "factor"),
        low_freq_factor=_real(rope, "low_freq_factor"),
        high_freq_factor=_real(rope, "high_freq_factor"),
        original_context=_integer(rope, "original_context_length"),
    )


def _fused(tensors: Mapping[str, Tensor], modules: tuple[str, ...], exact: bool) -> PackedLinear:
    """One linear map for modules that read the same input; a missing bias counts as zero."""
    weights = [tensors[f"{module}.weight"] for module in modules]
    biases = [tensors.get(f"{module}.bias") for module in modules]
    bias = None
    if any(part is not None for part in biases):
        bias = torch.cat(
            [
                weight.new_zeros(weight.shape[0]) if part is None else part
                for weight, part in zip(weights, biases, strict=True)
            ]
        )
    return PackedLinear(weights[0] if len(weights) == 1 else torch.cat(weights), bias, exact=exact)


def _integer(config: Mapping[str, JsonValue], key: str) -> int:
    value = config[key]
    if not isinstance(value, int):
        raise InvalidConfigError(f"block config {key!r} is {value!r}, not an integer", field=key)
    return value


def _real(config: Mapping[str, JsonValue], key: str) -> float:
    try:
        return float(cast(str, config[key]))
    except (TypeError, ValueError) as error:
        raise InvalidConfigError(
            f"block config {key!r} is {config[key]!r}, not a number", field=key
        ) from error
