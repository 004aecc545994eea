"""The layer of the pre-norm decoder families.

One implementation serves Llama, Mistral, Qwen2 and Qwen3: a block's config and tensors say
what differs between them (biases, query/key norm, rotary scaling, sliding window).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from blockkernels.backends import Backend
from blockkernels.decoder import LayerSizes, LayerSlot, LayerWeights
from blockkernels.gated_mlp import gated_activation
from blockkernels.rms_norm import rms_norm
from blockkernels.rotary import rotary
from blockzoo.compute.context import BlockContext
from blockzoo.compute.parts import fused, integer, real, rope_parameters
from blockzoo.manifest import JsonValue

ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT_MODULE = "self_attn.o_proj"
MLP_INPUTS = ("mlp.gate_proj", "mlp.up_proj")
DOWN_MODULE = "mlp.down_proj"
SLOTS = dict(zip((*ATTENTION_INPUTS, OUT_MODULE, *MLP_INPUTS, DOWN_MODULE), LayerSlot, strict=True))
"""The slot of a layer that each module of a checkpoint fills."""


class LayerBlock:
    """One pre-norm decoder layer: grouped-query attention and a gated feed-forward part.

    Query, key and value (and gate and up) are one matrix in memory, so a batch
    reads its input once.

    Attributes:
        kernel: for the whole layer in one call, bit for bit as the call of this block does part by part;
            None where the backend has no such kernel.
    """

    def __init__(
        self,
        config: Mapping[str, JsonValue],
        tensors: Mapping[str, Tensor],
        backend: Backend,
        *,
        exact: bool = False,
    ) -> None:
        self.hidden_size = integer(config, "hidden_size")
        self.num_heads = integer(config, "num_heads")
        self.num_kv_heads = integer(config, "num_kv_heads")
        self.head_dim = integer(config, "head_dim")
        self.window = None if config.get("sliding_window") is None else integer(config, "sliding_window")
        self.rope = rope_parameters(config)
        self._eps = real(config, "norm_eps")
        self._activation = str(config["activation"])
        self._exact = exact
        self._scale = self.head_dim**-0.5
        self._input_norm = tensors["input_layernorm.weight"]
        self._mlp_norm = tensors["post_attention_layernorm.weight"]
        self._query_norm = tensors.get("self_attn.q_norm.weight")
        self._key_norm = tensors.get("self_attn.k_norm.weight")
        self._qkv = fused(tensors, ATTENTION_INPUTS, backend, exact=exact)
        self._out = fused(tensors, (OUT_MODULE,), backend, exact=exact)
        self._gate_up = fused(tensors, MLP_INPUTS, backend, exact=exact)
        self._down = fused(tensors, (DOWN_MODULE,), backend, exact=exact)
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
        self.kernel = backend.layer(*self._as_layer())

    def __call__(self, hidden: Tensor, context: BlockContext) -> Tensor:
        """Shape: hidden [tokens, hidden_size], result likewise (a new tensor)."""
        hidden = hidden + self._attention(rms_norm(hidden, self._input_norm, self._eps), context)
        return hidden.add_(self._feed_forward(rms_norm(hidden, self._mlp_norm, self._eps), context))

    def _as_layer(self) -> tuple[LayerWeights, LayerSizes]:
        """The layer in the words of the kernels."""
        norms = (self._input_norm, self._mlp_norm, self._query_norm, self._key_norm)
        weights = LayerWeights(*norms, self._qkv, self._out, self._gate_up, self._down)
        heads = (self.num_heads, self.num_kv_heads, self.head_dim)
        sizes = LayerSizes(self.hidden_size, *heads, self.window, self._eps, self._scale, self._activation)
        return weights, sizes

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
        context.adapt(OUT_MODULE, mixed, out)
        return out

    def _feed_forward(self, x: Tensor, context: BlockContext) -> Tensor:
        gate_up = self._gate_up(x)
        self._adapt(MLP_INPUTS, x, gate_up, context)
        middle = gated_activation(gate_up, self._activation, exact=self._exact)
        out = self._down(middle)
        context.adapt(DOWN_MODULE, middle, out)
        return out

    def _adapt(self, modules: tuple[str, ...], x: Tensor, y: Tensor, context: BlockContext) -> None:
        for module in modules:
            context.adapt(module, x, y[:, self._columns[module]])
