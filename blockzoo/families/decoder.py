"""Cutting shared by the decoder families (RMS norm, rotary attention, gated feed-forward).

A family file states what differs from Llama, in class attributes where the architecture fixes it and in hooks
where config.json says it. The config of a layer block holds what its computation depends on and nothing else,
least of all its index, so equal layers are one block. `blockzoo.compute.decoder` reads that config.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from blockzoo.errors import UnsupportedFeatureError
from blockzoo.families.base import CHUNK_ROWS, ChainPlan, ConfigReader, Family, PlannedBlock, PlannedTensor
from blockzoo.families.rope import RopeForm, rope_config, served_context
from blockzoo.manifest import BlockKind, JsonValue

MAX_LAYERS = 2048
"""Most layers accepted; bounds the plan that a hostile config can ask for."""

_MAX_WIDTH = 1 << 20
_MAX_VOCAB = 1 << 24
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_pytorch_tanh"}
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,6})\.(.+)")
_IGNORABLE = re.compile(r"(?:.+\.)?rotary_emb\.inv_freq")

PRE_NORMS: Mapping[str, str] = {
    "attention_input": "input_layernorm",
    "mlp_input": "post_attention_layernorm",
}
"""Where the norms of a layer stand, and what a checkpoint calls them, in Llama and its relatives."""


class DecoderFamily(Family):
    """Base of the families; see the attributes and hooks below for what they may change."""

    absent: ClassVar[Mapping[str, object]] = {}
    """What transformers takes an absent key for, where that is not what it takes null for."""
    norms: ClassVar[Mapping[str, str]] = PRE_NORMS
    """Place of a norm (attention_input, attention_output, mlp_input, mlp_output) -> its module."""
    norm_kind: ClassVar[str] = "rounded"
    """How norms apply their weights; see `blockzoo.compute.parts.Norms`."""
    qk_norm: ClassVar[str] = ""
    """Queries and keys are normalised: "head" by head, over the whole "projection", or not."""
    fused_qkv: ClassVar[bool] = False
    """Queries, keys and values are one matrix in the checkpoint."""
    fused_gate_up: ClassVar[bool] = False
    """Gate and up are one matrix in the checkpoint."""
    rope: ClassVar[RopeForm] = RopeForm()
    """Which rotary positions the architecture can have."""
    activation_key: ClassVar[str] = "hidden_act"
    """The key of config.json that names the activation."""

    def plan(self, config: Mapping[str, object]) -> ChainPlan:
        """Cut a model with this config.json into embedding, layers and head."""
        reader = ConfigReader({**self.absent, **config})
        refuse_quantised(reader)
        layers = self._layers(reader)
        hidden = reader.integer("hidden_size", most=_MAX_WIDTH)
        vocab = reader.integer("vocab_size", most=_MAX_VOCAB)
        tied = reader.boolean("tie_word_embeddings", default=False)
        embedding = PlannedBlock(
            BlockKind.EMBEDDING,
            {"hidden_size": hidden, "vocab_size": vocab, **self.embedding_details(reader)},
            {"weight": PlannedTensor("model.embed_tokens.weight", (vocab, hidden), CHUNK_ROWS)},
        )
        details = self.head_details(reader)
        head = PlannedBlock(
            BlockKind.HEAD,
            {"hidden_size": hidden, "vocab_size": vocab, "tied": tied, **self._norm(reader, details)},
            {
                "norm.weight": PlannedTensor("model.norm.weight", (hidden,)),
                "lm_head.weight": PlannedTensor("lm_head.weight", (vocab, hidden), CHUNK_ROWS),
            },
        )
        context, notes = served_context(reader, self.rope)
        blocks = (embedding, *layers, head)
        return ChainPlan(self.name, blocks, context, vocab, tied, reader.unread(), notes)

    def is_ignorable(self, tensor: str) -> bool:
        """Rotary frequencies are computed; old checkpoints hold them all the same."""
        return _IGNORABLE.fullmatch(tensor) is not None

    def source_name(self, position: int, num_layers: int, tensor: str) -> str:
        """Return the checkpoint's name of a block's tensor."""
        if position == 0:
            return f"model.embed_tokens.{tensor}"
        if position <= num_layers:
            return f"model.layers.{position - 1}.{tensor}"
        return tensor if tensor.startswith("lm_head.") else f"model.{tensor}"

    def locate(self, source: str, num_layers: int) -> tuple[int, str] | None:
        """Return where a checkpoint's tensor lives in the chain."""
        layer = _LAYER.fullmatch(source)
        if layer:
            index = int(layer[1])
            return (index + 1, layer[2]) if index < num_layers else None
        if source.startswith("model.embed_tokens."):
            return 0, source.removeprefix("model.embed_tokens.")
        if source.startswith("model.norm."):
            return num_layers + 1, source.removeprefix("model.")
        return (num_layers + 1, source) if source.startswith("lm_head.") else None

    # What config.json may change.

    @abstractmethod
    def attention_bias(self, config: ConfigReader) -> tuple[bool, bool]:
        """Whether q, k, v have biases, and whether the output projection has one."""

    def mlp_bias(self, config: ConfigReader) -> bool:  # noqa: ARG002 - hook
        """Whether the feed-forward projections have biases."""
        return False

    def windows(self, config: ConfigReader, num_layers: int) -> Sequence[int | None]:  # noqa: ARG002 - hook
        """Sliding window of each layer in tokens, None to attend to everything before."""
        return (None,) * num_layers

    def ropes(self, config: ConfigReader, num_layers: int, head_dim: int) -> Sequence[JsonValue]:
        """Rotary positions of each layer as a layer's config has them, None for a layer without any."""
        return (rope_config(config, self.rope, head_dim),) * num_layers

    def layer_details(self, config: ConfigReader) -> Mapping[str, JsonValue]:  # noqa: ARG002 - hook
        """More entries of a layer's config: attention_scale, attention_softcap, residual_scale."""
        return {}

    def embedding_details(self, config: ConfigReader) -> Mapping[str, JsonValue]:  # noqa: ARG002 - hook
        """More entries of the embedding's config: scale; scale_type "rounded" gives it the weights' type."""
        return {}

    def head_details(self, config: ConfigReader) -> Mapping[str, JsonValue]:  # noqa: ARG002 - hook
        """More entries of the head's config: logits_divisor, logits_softcap."""
        return {}

    def default_head_dim(self, config: ConfigReader) -> int:
        """Width of a head when the config does not give it: the hidden size over the heads."""
        hidden, heads = config.integer("hidden_size", most=_MAX_WIDTH), config.integer("num_attention_heads")
        if hidden % heads:
            raise config.error("hidden_size", f"is {hidden}, not a multiple of num_attention_heads {heads}")
        return hidden // heads

    # The rest is shared.

    def _layers(self, reader: ConfigReader) -> list[PlannedBlock]:
        num_layers = reader.integer("num_hidden_layers", most=MAX_LAYERS)
        config = self._layer_config(reader)
        shapes = self._shapes(config, reader)
        windows = self.windows(reader, num_layers)
        ropes = self.ropes(reader, num_layers, _int(config, "head_dim"))
        blocks = []
        for index, (window, rope) in enumerate(zip(windows, ropes, strict=True)):
            tensors = {
                name: PlannedTensor(self.source_name(index + 1, num_layers, name), shape)
                for name, shape in shapes.items()
            }
            own = {**config, "rope": rope, "sliding_window": window}
            blocks.append(PlannedBlock(BlockKind.LAYER, own, tensors))
        return blocks

    def _layer_config(self, reader: ConfigReader) -> dict[str, JsonValue]:
        hidden = reader.integer("hidden_size", most=_MAX_WIDTH)
        heads = reader.integer("num_attention_heads", most=_MAX_WIDTH)
        kv_heads = reader.integer("num_key_value_heads", most=_MAX_WIDTH, default=heads)
        if heads % kv_heads:
            raise reader.error(
                "num_attention_heads", f"is {heads}, not a multiple of num_key_value_heads {kv_heads}"
            )
        given = reader.has("head_dim")
        head_dim = reader.integer("head_dim", most=_MAX_WIDTH) if given else self.default_head_dim(reader)
        if head_dim % 2:
            raise reader.error("head_dim", f"is {head_dim}; rotary positions need an even number")
        details: dict[str, JsonValue] = dict(self.layer_details(reader))
        if self.norms is not PRE_NORMS:
            details["norms"] = dict(self.norms)
        return {
            "hidden_size": hidden,
            "intermediate_size": reader.integer("intermediate_size", most=4 * _MAX_WIDTH),
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "activation": self._activation(reader),
            "qk_norm": self.qk_norm if self.qk_norm == "projection" else bool(self.qk_norm),
            **self._norm(reader, details),
        }

    def _norm(self, reader: ConfigReader, details: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
        """Entries about norms, and the details.

        Where either is news to older programs there is no `norm_eps`, so that they refuse the block.
        """
        eps = repr(reader.positive("rms_norm_eps", default=1e-6))
        if not details and self.norm_kind == "rounded":
            return {"norm_eps": eps}
        return {"norm": {"eps": eps, "kind": self.norm_kind}, **details}

    def _activation(self, reader: ConfigReader) -> str:
        name = reader.text(self.activation_key, default=str(self.absent.get(self.activation_key, "silu")))
        if name not in _ACTIVATIONS:
            raise UnsupportedFeatureError(
                f"config.json: activation {name[:80]!r} is not supported",
                hint=f"Supported activations: {', '.join(sorted(_ACTIVATIONS))}.",
            )
        return _ACTIVATIONS[name]

    def _shapes(self, config: Mapping[str, JsonValue], reader: ConfigReader) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of every tensor of a layer with this config."""
        hidden, wide, head_dim = (
            _int(config, key) for key in ("hidden_size", "intermediate_size", "head_dim")
        )
        query, kv = _int(config, "num_heads") * head_dim, _int(config, "num_kv_heads") * head_dim
        (qkv_bias, out_bias), mlp_bias = self.attention_bias(reader), self.mlp_bias(reader)
        rows = {"q_proj": query, "k_proj": kv, "v_proj": kv}
        rows = {"qkv_proj": query + 2 * kv} if self.fused_qkv else rows
        inner = {"gate_up_proj": 2 * wide} if self.fused_gate_up else {"gate_proj": wide, "up_proj": wide}
        linears = {
            **{f"self_attn.{name}": (count, hidden, qkv_bias) for name, count in rows.items()},
            "self_attn.o_proj": (hidden, query, out_bias),
            **{f"mlp.{name}": (count, hidden, mlp_bias) for name, count in inner.items()},
            "mlp.down_proj": (hidden, wide, mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {f"{module}.weight": (hidden,) for module in self.norms.values()}
        for module, (outer, columns, bias) in linears.items():
            shapes[f"{module}.weight"] = (outer, columns)
            if bias:
                shapes[f"{module}.bias"] = (outer,)
        if self.qk_norm:
            is_whole = self.qk_norm == "projection"
            shapes["self_attn.q_norm.weight"] = (query if is_whole else head_dim,)
            shapes["self_attn.k_norm.weight"] = (kv if is_whole else head_dim,)
        return shapes


def typed_windows(
    config: ConfigReader, num_layers: int, default: Sequence[str], window: int | None
) -> tuple[int | None, ...]:
    """Windows by `layer_types`.

    Args:
        config: of the model.
        num_layers: how many there are.
        default: the types when the config gives none.
        window: of layers of sliding attention, in tokens; None when none is in use.

    Raises:
        InvalidConfigError: the fields contradict each other.
        UnsupportedFeatureError: there is a layer of another type.
    """
    types = layer_types(config, num_layers, default)
    if window is None and "sliding_attention" in types:
        raise config.error("layer_types", "asks for sliding attention, but no sliding_window is in use")
    return tuple(window if item == "sliding_attention" else None for item in types)


def layer_types(config: ConfigReader, num_layers: int, default: Sequence[str]) -> Sequence[str]:
    """Types of the layers, each full_attention or sliding_attention; raises as `typed_windows` does."""
    types = config.raw("layer_types")
    if types is None:
        return default
    if not isinstance(types, list) or len(types) != num_layers:
        raise config.error("layer_types", f"is not a list of {num_layers} names")
    unknown = [item for item in types if item not in ("full_attention", "sliding_attention")]
    if unknown:
        raise UnsupportedFeatureError(
            f"config.json: layer type {str(unknown[0])[:80]!r} is not supported",
            hint="Supported layer types: full_attention, sliding_attention.",
        )
    return types


def sliding_window(config: ConfigReader) -> int | None:
    """The window when one is in use: `use_sliding_window` and `sliding_window` are both set."""
    if config.boolean("use_sliding_window", default=False) and config.has("sliding_window"):
        return config.integer("sliding_window")
    return None


def layer_windows(config: ConfigReader, num_layers: int) -> tuple[int | None, ...]:
    """Windows of the Qwen families: `layer_types` when given, else every layer from `max_window_layers` on.

    Raises:
        InvalidConfigError: the fields contradict each other.
    """
    window = sliding_window(config)
    first = config.integer("max_window_layers", least=0, default=28)
    default = ["full_attention"] * num_layers
    if window is not None:
        default[first:] = ["sliding_attention"] * len(default[first:])
    return typed_windows(config, num_layers, default, window)


def refuse_quantised(config: ConfigReader) -> None:
    """Refuse a checkpoint whose config says that its weights are quantised.

    Raises:
        UnsupportedFeatureError: `quantization_config` is set.
    """
    if config.has("quantization_config"):
        raise UnsupportedFeatureError(
            "config.json: the checkpoint is quantised (quantization_config is set)",
            hint="Register the original checkpoint in bfloat16, float16 or float32.",
        )


def _int(config: Mapping[str, JsonValue], key: str) -> int:
    value = config[key]
    assert isinstance(value, int)
    return value
