"""Granite 3 (dense): Llama with multipliers on embeddings, scores, residuals and logits."""

from __future__ import annotations

from collections.abc import Mapping

from blockzoo.families.base import ConfigReader
from blockzoo.families.decoder import DecoderFamily
from blockzoo.manifest import JsonValue


class GraniteFamily(DecoderFamily):
    """Each multiplier is 1 where the config does not give it, that of the scores too."""

    name = "granite"
    architectures = ("GraniteForCausalLM",)

    def attention_bias(self, config: ConfigReader) -> tuple[bool, bool]:
        """One switch for all four attention projections."""
        bias = config.boolean("attention_bias", default=False)
        return bias, bias

    def mlp_bias(self, config: ConfigReader) -> bool:
        """One switch for the feed-forward projections."""
        return config.boolean("mlp_bias", default=False)

    def layer_details(self, config: ConfigReader) -> Mapping[str, JsonValue]:
        """Multipliers of scores and of what a layer adds."""
        return {
            "attention_scale": repr(config.positive("attention_multiplier", default=1.0)),
            "residual_scale": repr(config.positive("residual_multiplier", default=1.0)),
        }

    def embedding_details(self, config: ConfigReader) -> Mapping[str, JsonValue]:
        """Multiplier of the embeddings."""
        return {"scale": repr(config.positive("embedding_multiplier", default=1.0))}

    def head_details(self, config: ConfigReader) -> Mapping[str, JsonValue]:
        """What logits are divided by."""
        return {"logits_divisor": repr(config.positive("logits_scaling", default=1.0))}
