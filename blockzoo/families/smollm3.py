"""SmolLM3: Llama with layers in between that know no positions (NoPE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from blockzoo.families.base import ConfigReader
from blockzoo.families.decoder import DecoderFamily, sliding_window, typed_windows
from blockzoo.families.rope import RopeForm, rope_config
from blockzoo.manifest import JsonValue


class SmolLM3Family(DecoderFamily):
    """Every fourth layer has no rotary positions unless the config lists others."""

    name = "smollm3"
    architectures = ("SmolLM3ForCausalLM",)
    absent: ClassVar[Mapping[str, object]] = {"num_key_value_heads": 4, "tie_word_embeddings": True}
    rope = RopeForm(theta=2000000.0)

    def attention_bias(self, config: ConfigReader) -> tuple[bool, bool]:
        """One switch for all four attention projections."""
        bias = config.boolean("attention_bias", default=False)
        return bias, bias

    def mlp_bias(self, config: ConfigReader) -> bool:
        """One switch for the feed-forward projections."""
        return config.boolean("mlp_bias", default=False)

    def ropes(self, config: ConfigReader, num_layers: int, head_dim: int) -> Sequence[JsonValue]:
        """None where `no_rope_layers` has a 0."""
        rope = rope_config(config, self.rope, head_dim)
        return [rope if rotates else None for rotates in _rotating(config, num_layers)]

    def windows(self, config: ConfigReader, num_layers: int) -> Sequence[int | None]:
        """Off unless `use_sliding_window`; then on layers without positions, or as `layer_types` says."""
        window = sliding_window(config)
        default = [
            "full_attention" if window is None or rotates else "sliding_attention"
            for rotates in _rotating(config, num_layers)
        ]
        return typed_windows(config, num_layers, default, window)


def _rotating(config: ConfigReader, num_layers: int) -> list[bool]:
    """Whether each layer has rotary positions: `no_rope_layers` holds a 1 for those that have."""
    given = config.raw("no_rope_layers")
    if given is None:
        interval = config.integer("no_rope_layer_interval", default=4)
        return [bool((index + 1) % interval) for index in range(num_layers)]
    if not isinstance(given, list) or len(given) < num_layers or not all(one in (0, 1) for one in given):
        raise config.error("no_rope_layers", f"is not a list of {num_layers} zeros and ones")
    return [bool(one) for one in given[:num_layers]]
