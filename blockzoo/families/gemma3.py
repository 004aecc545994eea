"""Gemma 3 (text): as Gemma 2 without soft caps, with query and key norms and positions by layer type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blockzoo.errors import UnsupportedFeatureError
from blockzoo.families.base import ConfigReader
from blockzoo.families.gemma2 import GemmaFamily
from blockzoo.families.rope import RopeForm, rope_config
from blockzoo.manifest import JsonValue

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_THETAS = {_GLOBAL: ("rope_theta", 1000000.0), _LOCAL: ("rope_local_base_freq", 10000.0)}
"""Key of transformers 4 and default of the wavelengths' base, by layer type."""


class Gemma3Family(GemmaFamily):
    """Five layers of sliding attention, then one of full attention."""

    name = "gemma3"
    architectures = ("Gemma3ForCausalLM",)
    model_type = "gemma3_text"
    qk_norm = "head"
    # The others change with the length of a sequence, and the context would have to end where the first does.
    rope = RopeForm(types=("default", "linear", "llama3", "yarn"))

    def pattern(self, config: ConfigReader) -> int:
        """The key that transformers 4 wrote, or 6."""
        return config.integer("sliding_window_pattern", default=6)

    def layer_details(self, config: ConfigReader) -> Mapping[str, JsonValue]:
        """Scale of the scores.

        Raises:
            UnsupportedFeatureError: there is a soft cap on them, which transformers passes over here.
        """
        if config.has("attn_logit_softcapping"):
            raise UnsupportedFeatureError(
                "config.json: attn_logit_softcapping is not supported for Gemma3ForCausalLM",
                hint="transformers computes Gemma 3 without it; set it to null to do the same.",
            )
        return super().layer_details(config)

    def ropes(self, config: ConfigReader, num_layers: int, head_dim: int) -> Sequence[JsonValue]:
        """The parameters of each layer's type."""
        by_type = {kind: rope_config(config, self.rope, head_dim, _values(config, kind)) for kind in _THETAS}
        return [by_type[kind] for kind in self.types(config, num_layers)]


def _values(config: ConfigReader, kind: str) -> Mapping[str, object]:
    """Rope parameters of a layer type; `rope_scaling` of transformers 4 is about full attention alone."""
    nested = _object(config, "rope_parameters")
    if nested and not nested.keys() <= _THETAS.keys():
        raise UnsupportedFeatureError(
            "config.json: rope_parameters that are not given for each layer type are not supported",
            hint=f"Give one object for each of {', '.join(_THETAS)}.",
        )
    own = nested.get(kind) or {}
    if not isinstance(own, dict):
        raise config.error("rope_parameters", f"has no object for {kind}")
    key, theta = _THETAS[kind]
    scaling = _object(config, "rope_scaling") if kind == _GLOBAL else {}
    return {"rope_theta": config.positive(key, default=theta), **own, **scaling}


def _object(config: ConfigReader, key: str) -> Mapping[str, object]:
    value = config.raw(key) or {}
    if not isinstance(value, dict):
        raise config.error(key, "is not an object")
    return value
