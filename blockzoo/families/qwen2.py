"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from blockzoo.families.base import ConfigReader
from blockzoo.families.decoder import DecoderFamily, layer_windows


class Qwen2Family(DecoderFamily):
    """The biases are fixed by the architecture, not by the config."""

    name = "qwen2"
    architectures = ("Qwen2ForCausalLM",)
    absent: ClassVar[Mapping[str, object]] = {"num_key_value_heads": 32, "sliding_window": 4096}

    def attention_bias(self, config: ConfigReader) -> tuple[bool, bool]:  # noqa: ARG002 - hook
        """On q, k and v, not on the output projection."""
        return True, False

    def windows(self, config: ConfigReader, num_layers: int) -> tuple[int | None, ...]:
        """Off unless `use_sliding_window`."""
        return layer_windows(config, num_layers)
