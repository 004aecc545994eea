"""OLMo 2: norms stand behind attention and feed-forward, and over all queries and all keys together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from blockzoo.families.base import ConfigReader
from blockzoo.families.decoder import DecoderFamily
from blockzoo.families.rope import RopeForm


class Olmo2Family(DecoderFamily):
    """Norms multiply in float32, and so does the rotation."""

    name = "olmo2"
    architectures = ("Olmo2ForCausalLM",)
    absent: ClassVar[Mapping[str, object]] = {"rms_norm_eps": 1e-5}
    norms: ClassVar[Mapping[str, str]] = {
        "attention_output": "post_attention_layernorm",
        "mlp_output": "post_feedforward_layernorm",
    }
    norm_kind = "wide"
    qk_norm = "projection"
    rope = RopeForm(wide=True)

    def attention_bias(self, config: ConfigReader) -> tuple[bool, bool]:
        """One switch for all four attention projections."""
        bias = config.boolean("attention_bias", default=False)
        return bias, bias
