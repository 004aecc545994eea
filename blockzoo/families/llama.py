"""Llama 2 and 3, and what shares their architecture (SmolLM2, TinyLlama, ...)."""

from __future__ import annotations

from blockzoo.families.base import ConfigReader
from blockzoo.families.decoder import DecoderFamily


class LlamaFamily(DecoderFamily):
    """Biases only where the config asks for them; no sliding window."""

    name = "llama"
    architectures = ("LlamaForCausalLM",)

    def attention_bias(self, config: ConfigReader) -> tuple[bool, bool]:
        """One switch for all four attention projections."""
        bias = config.boolean("attention_bias", default=False)
        return bias, bias

    def mlp_bias(self, config: ConfigReader) -> bool:
        """One switch for the feed-forward projections."""
        return config.boolean("mlp_bias", default=False)
