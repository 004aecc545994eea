"""Rotary position parameters as transformers writes them, in the zoo's spelling.

transformers 4 wrote `rope_theta` beside `rope_scaling`; transformers 5 writes one
`rope_parameters`. Types: "default", "linear" (positions divided by a factor) and
"llama3" (Llama 3.1, section "Long context": low frequencies divided, high kept).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blockzoo.errors import UnsupportedFeatureError
from blockzoo.families.base import ConfigReader
from blockzoo.manifest import JsonValue

SUPPORTED_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True)
class RopeForm:
    """Which rotary positions an architecture can have.

    Attributes:
        types: that transformers takes for it, of `SUPPORTED_TYPES`.
        theta: base of the wavelengths when the config gives none.
        is_partial: whether `partial_rotary_factor` may leave the end of a head as it is.
        neighbours: pairs of dimensions stand beside each other, not half of the rotated part apart.
        wide: values are rotated in float32 and rounded once, whatever the type of the model.
    """

    types: tuple[str, ...] = SUPPORTED_TYPES
    theta: float = 10000.0
    is_partial: bool = False
    neighbours: bool = False
    wide: bool = False


def rope_config(
    config: ConfigReader, form: RopeForm, head_dim: int, values: Mapping[str, object] | None = None
) -> dict[str, JsonValue]:
    """Return the rope part of a layer's config.

    Args:
        config: of the model.
        form: what the architecture can have.
        head_dim: dimensions of a head.
        values: the rope parameters, for a layer that has others than the model.

    Raises:
        InvalidConfigError: a parameter is missing or out of range.
        UnsupportedFeatureError: another type, or rotary positions on a part of the head only.
    """
    values = _rope_values(config) if values is None else values
    rope = ConfigReader(values, where="config.json: rope parameters")
    kind = rope.text("rope_type", default=rope.text("type", default="default"))
    if kind not in form.types:
        raise UnsupportedFeatureError(
            f"config.json: rope type {kind[:80]!r} is not supported",
            hint=f"Supported rope types: {', '.join(form.types)}.",
            rope_type=kind[:80],
        )
    theta = rope.positive("rope_theta", default=config.positive("rope_theta", default=form.theta))
    found: dict[str, JsonValue] = {
        "type": kind,
        "theta": repr(theta),
        **_layout(config, rope, form, head_dim),
    }
    factor = rope.positive("factor") if kind != "default" else 1.0
    if kind == "llama3":
        return {**found, "factor": repr(factor), **_llama3(rope, config)}
    # A factor of 1 divides nothing; spelling both the same lets such layers be shared.
    if factor == 1.0:
        return {**found, "type": "default"}
    return {**found, "factor": repr(factor)}


def _layout(config: ConfigReader, rope: ConfigReader, form: RopeForm, head_dim: int) -> dict[str, JsonValue]:
    """Which dimensions of a head are rotated and how, where that is not all of them, by halves."""
    found: dict[str, JsonValue] = {}
    share = rope.positive(
        "partial_rotary_factor", default=config.positive("partial_rotary_factor", default=1.0)
    )
    if share != 1.0:
        if not form.is_partial:
            raise UnsupportedFeatureError(
                "config.json: partial_rotary_factor other than 1 is not supported for this architecture"
            )
        rotary_dim = int(head_dim * share)
        if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
            raise config.error(
                "partial_rotary_factor",
                f"is {share}: of {head_dim} dimensions of a head {rotary_dim} cannot be rotated in pairs",
            )
        if rotary_dim != head_dim:
            found["rotary_dim"] = rotary_dim
    if form.neighbours:
        found["pairs"] = "neighbours"
    if form.wide:
        found["angles"] = "float32"
    return found


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
