"""The layer of the decoder families.

One implementation serves all of them: a block's config and tensors say what differs between them (biases,
norms and where they stand, rotary positions, sliding windows, soft caps, scales, which linear maps are
stored as one matrix).
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
from blockzoo.compute.parts import Norms, fused, integer, optional, rope_parameters
from blockzoo.compute.stored import compute_dtype, is_quantised
from blockzoo.errors import InvalidConfigError
from blockzoo.manifest import JsonValue

QKV_MODULE, GATE_UP_MODULE = "self_attn.qkv_proj", "mlp.gate_up_proj"
ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT_MODULE = "self_attn.o_proj"
MLP_INPUTS = ("mlp.gate_proj", "mlp.up_proj")
DOWN_MODULE = "mlp.down_proj"
SLOTS = {
    **dict(zip((*ATTENTION_INPUTS, OUT_MODULE, *MLP_INPUTS, DOWN_MODULE), LayerSlot, strict=True)),
    QKV_MODULE: LayerSlot.QUERY,
    GATE_UP_MODULE: LayerSlot.GATE,
}
"""The slot of a layer that each module of a checkpoint fills; one for a whole result fills its first."""

PRE_NORMS: Mapping[str, JsonValue] = {
    "attention_input": "input_layernorm",
    "mlp_input": "post_attention_layernorm",
}
"""Place of a norm -> module, for a layer whose config does not say."""


class LayerBlock:
    """One decoder layer: grouped-query attention and a gated feed-forward part.

    Query, key and value (and gate and up) are one matrix in memory, so a batch
    reads its input once.

    Attributes:
        kernel: for the whole layer in one call (on an exact backend with the bits of the call of this block);
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
        self._exact = exact
        self._qkv_modules = _present(tensors, QKV_MODULE, ATTENTION_INPUTS)
        self._gate_up_modules = _present(tensors, GATE_UP_MODULE, MLP_INPUTS)
        self._weights = self._lay_out(config, tensors, backend)
        self._sizes = self._read_sizes(config)
        _check_norms(self._weights, self._sizes)
        linears = (self._weights.qkv, self._weights.out, self._weights.gate_up, self._weights.down)
        self.num_bytes = sum(norm.nbytes for norm in self._weights.norms) + sum(
            linear.num_bytes for linear in linears
        )
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        wide = self._weights.down.in_features
        self._columns = {
            QKV_MODULE: slice(0, query + 2 * kv),
            "self_attn.q_proj": slice(0, query),
            "self_attn.k_proj": slice(query, query + kv),
            "self_attn.v_proj": slice(query + kv, query + 2 * kv),
            GATE_UP_MODULE: slice(0, 2 * wide),
            "mlp.gate_proj": slice(0, wide),
            "mlp.up_proj": slice(wide, 2 * wide),
        }
        inputs = (*self._qkv_modules, *self._gate_up_modules)
        self.module_shapes = {
            **{name: (_width(self._columns[name]), self.hidden_size) for name in inputs},
            OUT_MODULE: (self.hidden_size, query),
            DOWN_MODULE: (self.hidden_size, wide),
        }
        self.kernel = backend.layer(self._weights, self._sizes, compute_dtype(tensors))

    def __call__(self, hidden: Tensor, context: BlockContext) -> Tensor:
        """Shape: hidden [tokens, hidden_size], result likewise (a new tensor)."""
        weights = self._weights
        out = self._attention(self._normalise(hidden, weights.input_norm), context)
        hidden = hidden + self._scaled(self._normalise(out, weights.out_norm))
        out = self._feed_forward(self._normalise(hidden, weights.mlp_norm), context)
        return hidden.add_(self._scaled(self._normalise(out, weights.down_norm)))

    def _lay_out(
        self, config: Mapping[str, JsonValue], tensors: Mapping[str, Tensor], backend: Backend
    ) -> LayerWeights:
        """The layer's weights in the words of the kernels."""
        norms = Norms(config)
        placed = _norm_places(config)

        def norm(module: object) -> Tensor:
            return norms.weight(tensors[f"{module}.weight"])

        def heads(module: str) -> Tensor | None:
            return norm(module) if f"{module}.weight" in tensors else None

        def place(name: str) -> Tensor | None:
            return norm(placed[name]) if name in placed else None

        return LayerWeights(
            input_norm=place("attention_input"),
            mlp_norm=place("mlp_input"),
            query_norm=heads("self_attn.q_norm"),
            key_norm=heads("self_attn.k_norm"),
            qkv=fused(tensors, self._qkv_modules, backend, exact=self._exact),
            out=fused(tensors, (OUT_MODULE,), backend, exact=self._exact),
            gate_up=fused(tensors, self._gate_up_modules, backend, exact=self._exact),
            down=fused(tensors, (DOWN_MODULE,), backend, exact=self._exact),
            out_norm=place("attention_output"),
            down_norm=place("mlp_output"),
        )

    def _read_sizes(self, config: Mapping[str, JsonValue]) -> LayerSizes:
        """Sizes and constants in the words of the kernels."""
        scale, residual = optional(config, "attention_scale"), optional(config, "residual_scale")
        return LayerSizes(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            window=self.window,
            eps=Norms(config).eps,
            scale=self.head_dim**-0.5 if scale is None else scale,
            activation=str(config["activation"]),
            softcap=optional(config, "attention_softcap"),
            residual_scale=1.0 if residual is None else residual,
            rotates=self.rope is not None,
            neighbours=self.rope is not None and self.rope.neighbours,
        )

    def _normalise(self, x: Tensor, norm: Tensor | None) -> Tensor:
        return x if norm is None else rms_norm(x, norm, self._sizes.eps)

    def _scaled(self, added: Tensor) -> Tensor:
        return added if self._sizes.residual_scale == 1.0 else added * self._sizes.residual_scale

    def _attention(self, x: Tensor, context: BlockContext) -> Tensor:
        tokens = x.shape[0]
        qkv = self._weights.qkv(x)
        self._adapt(self._qkv_modules, x, qkv, context)
        query, key, value = self._placed(qkv, context)
        sizes = self._sizes
        mixed = context.attend(
            query, key, value, scale=sizes.scale, window=self.window, softcap=sizes.softcap
        ).reshape(tokens, self.num_heads * self.head_dim)
        out = self._weights.out(mixed)
        context.adapt(OUT_MODULE, mixed, out)
        return out

    def _placed(self, qkv: Tensor, context: BlockContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [tokens, heads, head_dim], the first two normalised and rotated."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        states = qkv.view(-1, heads + 2 * kv_heads, self.head_dim)
        value = states[:, heads + kv_heads :]
        query_norm, key_norm = self._weights.query_norm, self._weights.key_norm
        if query_norm is None or key_norm is None:
            turned = self._rotated(states[:, : heads + kv_heads], context)
            return turned[:, :heads], turned[:, heads:], value
        if len(query_norm) == self.head_dim:
            query, key = states[:, :heads], states[:, heads : heads + kv_heads]
            query, key = self._normalise(query, query_norm), self._normalise(key, key_norm)
        else:
            rows = qkv[:, : (heads + kv_heads) * self.head_dim]
            query, key = rows.split([heads * self.head_dim, kv_heads * self.head_dim], dim=1)
            query = self._normalise(query, query_norm).view(-1, heads, self.head_dim)
            key = self._normalise(key, key_norm).view(-1, kv_heads, self.head_dim)
        return self._rotated(query, context), self._rotated(key, context), value

    def _rotated(self, x: Tensor, context: BlockContext) -> Tensor:
        if self.rope is None:
            return x
        return rotary(x, *context.rotary(self.rope), neighbours=self.rope.neighbours)

    def _feed_forward(self, x: Tensor, context: BlockContext) -> Tensor:
        gate_up = self._weights.gate_up(x)
        self._adapt(self._gate_up_modules, x, gate_up, context)
        middle = gated_activation(gate_up, self._sizes.activation, exact=self._exact)
        out = self._weights.down(middle)
        context.adapt(DOWN_MODULE, middle, out)
        return out

    def _adapt(self, modules: tuple[str, ...], x: Tensor, y: Tensor, context: BlockContext) -> None:
        for module in modules:
            context.adapt(module, x, y[:, self._columns[module]])


def _present(tensors: Mapping[str, Tensor], whole: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    """The modules that make up a result: one, or one for each part."""
    return (whole,) if f"{whole}.weight" in tensors or is_quantised(tensors, whole) else parts


def _norm_places(config: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    """Place of a norm -> module."""
    placed = config.get("norms", PRE_NORMS)
    known = {"attention_input", "attention_output", "mlp_input", "mlp_output"}
    if not isinstance(placed, Mapping) or not known >= placed.keys():
        raise InvalidConfigError(
            f"norms at {str(placed)[:80]!r} cannot be run by this version",
            hint="Upgrade blockzoo on this machine.",
            field="norms",
        )
    return placed


def _check_norms(weights: LayerWeights, sizes: LayerSizes) -> None:
    """Raise InvalidConfigError where a norm does not have the size of what it normalises."""
    by_head = (sizes.head_dim,) * 2
    whole = (sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim)
    found = (weights.query_norm, weights.key_norm)
    if any(norm is not None for norm in found):
        shapes = tuple(() if norm is None else tuple(norm.shape) for norm in found)
        if shapes not in tuple(tuple((size,) for size in pair) for pair in (by_head, whole)):
            raise InvalidConfigError(f"norms of queries and keys have the shapes {shapes}", field="qk_norm")
    for norm in (weights.input_norm, weights.mlp_norm, weights.out_norm, weights.down_norm):
        if norm is not None and norm.shape != (sizes.hidden_size,):
            raise InvalidConfigError(
                f"a norm has the shape {tuple(norm.shape)}, hidden states have {sizes.hidden_size} elements",
                field="norms",
            )


def _width(columns: slice) -> int:
    return int(columns.stop - columns.start)
