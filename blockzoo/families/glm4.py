"""GLM-4 (dense): norms before and behind each half of a layer, neighbours rotated in a half of each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from blockzoo.families.base import ConfigReader
from blockzoo.families.decoder import DecoderFamily
from blockzoo.families.rope import RopeForm


class Glm4Family(DecoderFamily):
    """One matrix for gate and up."""

    name = "glm4"
    architectures = ("Glm4ForCausalLM",)
    absent: ClassVar[Mapping[str, object]] = {
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-07,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
    }
    norms: ClassVar[Mapping[str, str]] = {
        "attention_input": "input_layernorm",
        "attention_output": "post_self_attn_layernorm",
        "mlp_input": "post_attention_layernorm",
        "mlp_output": "post_mlp_layernorm",
    }
    fused_gate_up = True
    rope = RopeForm(is_partial=True, neighbours=True)

    def attention_bias(self, config: ConfigReader) -> tuple[bool, bool]:
        """A switch for q, k and v; the output projection has none."""
        return config.boolean("attention_bias", default=False), False
