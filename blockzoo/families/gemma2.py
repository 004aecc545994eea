"""Gemma 2: sandwich norms, soft caps on scores and logits, sliding windows on every other layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from blockzoo.errors import UnsupportedFeatureError
from blockzoo.families.base import ConfigReader
from blockzoo.families.decoder import DecoderFamily, layer_types, typed_windows
from blockzoo.manifest import JsonValue


class GemmaFamily(DecoderFamily):
    """What Gemma 2 and 3 have in common; norms multiply with 1 + weight."""

    absent: ClassVar[Mapping[str, object]] = {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    }
    norms: ClassVar[Mapping[str, str]] = {
        "attention_input": "input_layernorm",
        "attention_output": "post_attention_layernorm",
        "mlp_input": "pre_feedforward_layernorm",
        "mlp_output": "post_feedforward_layernorm",
    }
    norm_kind = "centred"
    activation_key = "hidden_activation"

    def attention_bias(self, config: ConfigReader) -> tuple[bool, bool]:
        """One switch for all four attention projections."""
        bias = config.boolean("attention_bias", default=False)
        return bias, bias

    def windows(self, config: ConfigReader, num_layers: int) -> Sequence[int | None]:
        """The window on layers of sliding attention."""
        window = config.integer("sliding_window") if config.has("sliding_window") else None
        return typed_windows(config, num_layers, self.types(config, num_layers), window)

    def types(self, config: ConfigReader, num_layers: int) -> Sequence[str]:
        """Type of each layer: every `pattern`-th one is of full attention unless the config lists others."""
        default = _every(self.pattern(config), num_layers)
        return layer_types(config, num_layers, default)

    def pattern(self, config: ConfigReader) -> int:  # noqa: ARG002 - hook
        """Every which layer is of full attention."""
        return 2

    def layer_details(self, config: ConfigReader) -> Mapping[str, JsonValue]:
        """Scale of the scores.

        Raises:
            UnsupportedFeatureError: attention looks ahead.
        """
        if config.boolean("use_bidirectional_attention", default=False):
            raise UnsupportedFeatureError(
                "config.json: use_bidirectional_attention is not supported",
                hint="Models that generate text attend to what came before.",
            )
        scalar = config.positive("query_pre_attn_scalar", default=256.0)
        return {"attention_scale": repr(scalar**-0.5)}

    def embedding_details(self, config: ConfigReader) -> Mapping[str, JsonValue]:
        """The root of the hidden size, in the type of the weights."""
        return {"scale": repr(config.integer("hidden_size") ** 0.5), "scale_type": "rounded"}

    def head_details(self, config: ConfigReader) -> Mapping[str, JsonValue]:
        """The soft cap of the logits, if there is one."""
        return _cap(config, "final_logit_softcapping", "logits_softcap")


class Gemma2Family(GemmaFamily):
    """Scores and logits have soft caps unless the config says null."""

    name = "gemma2"
    architectures = ("Gemma2ForCausalLM",)
    absent: ClassVar[Mapping[str, object]] = {
        **GemmaFamily.absent,
        "attn_logit_softcapping": 50,
        "final_logit_softcapping": 30,
    }

    def layer_details(self, config: ConfigReader) -> Mapping[str, JsonValue]:
        """Scale and soft cap of the scores."""
        return {
            **super().layer_details(config),
            **_cap(config, "attn_logit_softcapping", "attention_softcap"),
        }


def _every(pattern: int, num_layers: int) -> list[str]:
    return ["sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(num_layers)]


def _cap(config: ConfigReader, key: str, name: str) -> dict[str, JsonValue]:
    return {name: repr(config.positive(key))} if config.has(key) else {}
