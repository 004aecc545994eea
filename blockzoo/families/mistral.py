"""Mistral: Llama with grouped queries and one sliding window for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from blockzoo.errors import UnsupportedFeatureError
from blockzoo.families.base import ConfigReader
from blockzoo.families.decoder import DecoderFamily


class MistralFamily(DecoderFamily):
    """No biases; `sliding_window` null means none, and an absent one 4096."""

    name = "mistral"
    architectures = ("MistralForCausalLM",)
    absent: ClassVar[Mapping[str, object]] = {"num_key_value_heads": 8, "sliding_window": 4096}

    def attention_bias(self, config: ConfigReader) -> tuple[bool, bool]:  # noqa: ARG002 - hook
        """Never."""
        return False, False

    def windows(self, config: ConfigReader, num_layers: int) -> tuple[int | None, ...]:
        """The same window everywhere."""
        if config.has("layer_types"):
            raise UnsupportedFeatureError("config.json: layer_types is not supported for MistralForCausalLM")
        window = config.integer("sliding_window") if config.has("sliding_window") else None
        return (window,) * num_layers
