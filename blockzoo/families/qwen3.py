"""Qwen3 (dense): queries and keys are normalised per head before the rotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from blockzoo.families.base import ConfigReader
from blockzoo.families.decoder import DecoderFamily, layer_windows


class Qwen3Family(DecoderFamily):
    """Head width is independent of the hidden size."""

    name = "qwen3"
    architectures = ("Qwen3ForCausalLM",)
    qk_norm = "head"
    absent: ClassVar[Mapping[str, object]] = {"num_key_value_heads": 32, "sliding_window": 4096}

    def attention_bias(self, config: ConfigReader) -> tuple[bool, bool]:
        """One switch for all four attention projections."""
        bias = config.boolean("attention_bias", default=False)
        return bias, bias

    def windows(self, config: ConfigReader, num_layers: int) -> tuple[int | None, ...]:
        """Off unless `use_sliding_window`."""
        return layer_windows(config, num_layers)

    def default_head_dim(self, config: ConfigReader) -> int:  # noqa: ARG002 - hook
        """128, as transformers' Qwen3 config says."""
        return 128
