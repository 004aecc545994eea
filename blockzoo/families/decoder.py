"""Cutting shared by the pre-norm decoder families (RMS norm, rotary attention, gated feed-forward).

A family file states what differs: biases, query/key norm, sliding windows. The
config of a layer block holds what its computation depends on and nothing else,
least of all its index, so equal layers are one block.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from blockzoo.errors import UnsupportedFeatureError
from blockzoo.families.base import CHUNK_ROWS, ChainPlan, ConfigReader, Family, PlannedBlock, PlannedTensor
from blockzoo.families.rope import rope_config
from blockzoo.manifest import BlockKind, JsonValue

MAX_LAYERS = 2048
"""Most layers accepted; bounds the plan that a hostile config can ask for."""

_MAX_WIDTH = 1 << 20
_MAX_VOCAB = 1 << 24
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_pytorch_tanh"}
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,6})\.(.+)")
_IGNORABLE = re.compile(r"(?:.+\.)?rotary_emb\.inv_freq")


class DecoderFamily(Family):
    """Base of the families; see the hooks below for what they may change."""

    absent: ClassVar[Mapping[str, JsonValue]] = {}
    """What transformers takes an absent key for, where that is not what it takes null for."""

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
            {"hidden_size": hidden, "vocab_size": vocab},
            {"weight": PlannedTensor("model.embed_tokens.weight", (vocab, hidden), CHUNK_ROWS)},
        )
        head = PlannedBlock(
            BlockKind.HEAD,
            {"hidden_size": hidden, "vocab_size": vocab, "norm_eps": _norm_eps(reader), "tied": tied},
            {
                "norm.weight": PlannedTensor("model.norm.weight", (hidden,)),
                "lm_head.weight": PlannedTensor("lm_head.weight", (vocab, hidden), CHUNK_ROWS),
            },
        )
        context = reader.integer("max_position_embeddings")
        return ChainPlan(self.name, (embedding, *layers, head), context, vocab, tied)

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

    # What a family may change.

    @abstractmethod
    def attention_bias(self, config: ConfigReader) -> tuple[bool, bool]:
        """Whether q, k, v have biases, and whether the output projection has one."""

    def mlp_bias(self, config: ConfigReader) -> bool:  # noqa: ARG002 - hook
        """Whether the feed-forward projections have biases."""
        return False

    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return False

    def windows(self, config: ConfigReader, num_layers: int) -> tuple[int | None, ...]:  # noqa: ARG002 - hook
        """Sliding window of each layer in tokens, None to attend to everything before."""
        return (None,) * num_layers

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
        qkv_bias, out_bias = self.attention_bias(reader)
        shapes = layer_shapes(config, qkv_bias, out_bias, self.mlp_bias(reader))
        blocks = []
        for index, window in enumerate(self.windows(reader, num_layers)):
            tensors = {
                name: PlannedTensor(self.source_name(index + 1, num_layers, name), shape)
                for name, shape in shapes.items()
            }
            blocks.append(PlannedBlock(BlockKind.LAYER, {**config, "sliding_window": window}, tensors))
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
        return {
            "hidden_size": hidden,
            "intermediate_size": reader.integer("intermediate_size", most=4 * _MAX_WIDTH),
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "norm_eps": _norm_eps(reader),
            "rope": rope_config(reader),
            "activation": _activation(reader),
            "qk_norm": self.has_qk_norm(),
        }


def layer_shapes(
    config: Mapping[str, JsonValue], qkv_bias: bool, out_bias: bool, mlp_bias: bool
) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor of a layer with this config, in checkpoint order."""
    hidden, wide, head_dim = (_int(config, key) for key in ("hidden_size", "intermediate_size", "head_dim"))
    query, kv = _int(config, "num_heads") * head_dim, _int(config, "num_kv_heads") * head_dim
    linears = {
        "self_attn.q_proj": (query, hidden, qkv_bias),
        "self_attn.k_proj": (kv, hidden, qkv_bias),
        "self_attn.v_proj": (kv, hidden, qkv_bias),
        "self_attn.o_proj": (hidden, query, out_bias),
        "mlp.gate_proj": (wide, hidden, mlp_bias),
        "mlp.up_proj": (wide, hidden, mlp_bias),
        "mlp.down_proj": (hidden, wide, mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for module, (rows, columns, bias) in linears.items():
        shapes[f"{module}.weight"] = (rows, columns)
        if bias:
            shapes[f"{module}.bias"] = (rows,)
    shapes["post_attention_layernorm.weight"] = (hidden,)
    if config["qk_norm"]:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (head_dim,)
    return shapes


def layer_windows(config: ConfigReader, num_layers: int) -> tuple[int | None, ...]:
    """Windows of the Qwen families: `layer_types` when given, else every layer from `max_window_layers` on.

    Raises:
        InvalidConfigError: the fields contradict each other.
    """
    window = None
    if config.boolean("use_sliding_window", default=False) and config.has("sliding_window"):
        window = config.integer("sliding_window")
    types = config.raw("layer_types")
    if types is None:
        first = config.integer("max_window_layers", least=0, default=28)
        return tuple(window if index >= first else None for index in range(num_layers))
    if not isinstance(types, list) or len(types) != num_layers:
        raise config.error("layer_types", f"is not a list of {num_layers} names")
    unknown = [item for item in types if item not in ("full_attention", "sliding_attention")]
    if unknown:
        raise UnsupportedFeatureError(
            f"config.json: layer type {str(unknown[0])[:80]!r} is not supported",
            hint="Supported layer types: full_attention, sliding_attention.",
        )
    if window is None and "sliding_attention" in types:
        raise config.error("layer_types", "asks for sliding attention, but no sliding_window is in use")
    return tuple(window if item == "sliding_attention" else None for item in types)


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


def _norm_eps(config: ConfigReader) -> str:
    return repr(config.positive("rms_norm_eps", default=1e-6))


def _activation(config: ConfigReader) -> str:
    name = config.text("hidden_act", default="silu")
    if name not in _ACTIVATIONS:
        raise UnsupportedFeatureError(
            f"config.json: activation {name[:80]!r} is not supported",
            hint=f"Supported activations: {', '.join(sorted(_ACTIVATIONS))}.",
        )
    return _ACTIVATIONS[name]


def _int(config: Mapping[str, JsonValue], key: str) -> int:
    value = config[key]
    assert isinstance(value, int)
    return value
