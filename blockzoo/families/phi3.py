"""Phi-3 and Phi-4: Llama with one matrix for queries, keys and values, and one for gate and up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from blockzoo.families.base import ConfigReader
from blockzoo.families.decoder import DecoderFamily
from blockzoo.families.rope import RopeForm


class Phi3Family(DecoderFamily):
    """No biases; one sliding window for all layers, if any."""

    name = "phi3"
    architectures = ("Phi3ForCausalLM",)
    absent: ClassVar[Mapping[str, object]] = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}
    fused_qkv = fused_gate_up = True
    rope = RopeForm(
        types=("default", "longrope"),
        aliases=(("su", "longrope"), ("yarn", "longrope")),
        is_partial=True,
        recomputes=True,
    )

    def attention_bias(self, config: ConfigReader) -> tuple[bool, bool]:  # noqa: ARG002 - hook
        """Never."""
        return False, False

    def windows(self, config: ConfigReader, num_layers: int) -> Sequence[int | None]:
        """The same window everywhere."""
        window = config.integer("sliding_window") if config.has("sliding_window") else None
        return (window,) * num_layers
