"""Rotary position parameters as transformers writes them, in the zoo's spelling.

transformers 4 wrote `rope_theta` beside `rope_scaling`; transformers 5 writes one
`rope_parameters`. Types: "default", "linear" (positions divided by a factor) and
"llama3" (Llama 3.1, section "Long context": low frequencies divided, high kept).
"""

from __future__ import annotations

from blockzoo.errors import UnsupportedFeatureError
from blockzoo.families.base import ConfigReader
from blockzoo.manifest import JsonValue

SUPPORTED_TYPES = ("default", "linear", "llama3")
_DEFAULT_THETA = 10000.0


def rope_config(config: ConfigReader) -> dict[str, JsonValue]:
    """Return the rope part of a layer's config.

    Raises:
        InvalidConfigError: a parameter is missing or out of range.
        UnsupportedFeatureError: another type, or rotary positions on a part of the head only.
    """
    values = _rope_values(config)
    rope = ConfigReader(values, where="config.json: rope parameters")
    kind = rope.text("rope_type", default=rope.text("type", default="default"))
    if kind not in SUPPORTED_TYPES:
        raise UnsupportedFeatureError(
            f"config.json: rope type {kind[:80]!r} is not supported",
            hint=f"Supported rope types: {', '.join(SUPPORTED_TYPES)}.",
            rope_type=kind[:80],
        )
    for reader in (rope, config):
        if reader.positive("partial_rotary_factor", default=1.0) != 1.0:
            raise UnsupportedFeatureError("config.json: partial_rotary_factor other than 1 is not supported")
    theta = rope.positive("rope_theta", default=config.positive("rope_theta", default=_DEFAULT_THETA))
    factor = rope.positive("factor") if kind != "default" else 1.0
    if kind == "llama3":
        return {"type": kind, "theta": repr(theta), "factor": repr(factor), **_llama3(rope, config)}
    # A factor of 1 divides nothing; spelling both the same lets such layers be shared.
    if factor == 1.0:
        return {"type": "default", "theta": repr(theta)}
    return {"type": kind, "theta": repr(theta), "factor": repr(factor)}


def _rope_values(config: ConfigReader) -> dict[str, object]:
    # The older field wins when both are there, as in transformers 5.
    for key in ("rope_scaling", "rope_parameters"):
        value = config.raw(key)
        if value:
            if not isinstance(value, dict):
                raise config.error(key, "is not an object")
            if any(isinstance(item, dict) for item in value.values()):
                raise UnsupportedFeatureError(
                    f"config.json: {key} differs between layer types, which is not supported"
                )
            return value
    return {}


def _llama3(rope: ConfigReader, config: ConfigReader) -> dict[str, JsonValue]:
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if high <= low:
        raise rope.error("high_freq_factor", f"is {high}, not above low_freq_factor {low}")
    context = config.integer("max_position_embeddings")
    original = rope.integer("original_max_position_embeddings", default=context)
    # Phi-like configs keep it outside; transformers lets that value win.
    original = config.integer("original_max_position_embeddings", default=original)
    return {"low_freq_factor": repr(low), "high_freq_factor": repr(high), "original_context_length": original}
