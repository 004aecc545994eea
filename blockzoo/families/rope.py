"""Rotary position parameters as transformers writes them, in the zoo's spelling.

transformers 4 wrote `rope_theta` beside `rope_scaling`; transformers 5 writes one
`rope_parameters`. Types: "default", "linear" (positions divided by a factor), "llama3"
(Llama 3.1, section "Long context": low frequencies divided, high kept), "yarn" (the same
over a ramp of dimensions), "dynamic" and "longrope".

The last two change with the length of a sequence, beyond the context of the first training.
`blockkernels.rotary.RotaryTables` says which angles a position has then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from blockzoo.errors import UnsupportedFeatureError
from blockzoo.families.base import ConfigReader
from blockzoo.manifest import JsonValue

SUPPORTED_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")

_MAX_FACTOR = 1e6
"""Largest factor of a wavelength that is taken for meant."""
_MAX_CONTEXT = 2**31 - 1
"""As large as the context that a config can give itself."""
_RANGES = {
    "theta": (1.0, 1e12),
    "factor": (1e-3, _MAX_FACTOR),
    "attention_factor": (1e-3, 1e3),
    "low_freq_factor": (1e-3, _MAX_FACTOR),
    "high_freq_factor": (1e-3, _MAX_FACTOR),
}
"""Numbers outside leave angles without meaning or out of float32's range, and every call would fail."""


@dataclass(frozen=True, slots=True)
class RopeForm:
    """Which rotary positions an architecture can have.

    Attributes:
        types: that transformers takes for it, of `SUPPORTED_TYPES`.
        aliases: (what older configs call a type, the type).
        theta: base of the wavelengths when the config gives none.
        is_partial: whether `partial_rotary_factor` may leave the end of a head as it is.
        neighbours: pairs of dimensions stand beside each other, not half of the rotated part apart.
        wide: values are rotated in float32 and rounded once, whatever the type of the model.
        recomputes: with "longrope", a sequence that grows beyond the original context is computed again.
    """

    types: tuple[str, ...] = SUPPORTED_TYPES
    aliases: tuple[tuple[str, str], ...] = ()
    theta: float = 10000.0
    is_partial: bool = False
    neighbours: bool = False
    wide: bool = False
    recomputes: bool = False


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
    found = _rope_config(config, rope, form, head_dim)
    for name, (least, most) in _RANGES.items():
        if isinstance(spelled := found.get(name), str) and not least <= float(spelled) <= most:
            key = "rope_theta" if name == "theta" else name
            raise rope.error(key, f"is {spelled}, outside {least:g} to {most:g}")
    return found


def _rope_config(
    config: ConfigReader, rope: ConfigReader, form: RopeForm, head_dim: int
) -> dict[str, JsonValue]:
    kind = _kind(rope, form)
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
    rotary_dim = found.get("rotary_dim", head_dim)
    assert isinstance(rotary_dim, int)
    if kind == "dynamic":
        return {**found, **_dynamic(rope, config, rotary_dim)}
    if kind == "longrope":
        return {**found, **_longrope(rope, config, rotary_dim, form)}
    if kind == "yarn":
        return {**found, **_yarn(rope, config, rotary_dim, theta)}
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


def is_by_layer_type(config: ConfigReader) -> bool:
    """Tell whether the rope parameters are given for each type of layer by itself."""
    value = config.raw("rope_parameters")
    return isinstance(value, dict) and any(isinstance(item, dict) for item in value.values())


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
    original = _original_context(rope, config)
    return {"low_freq_factor": repr(low), "high_freq_factor": repr(high), "original_context_length": original}


def _yarn(rope: ConfigReader, config: ConfigReader, rotary_dim: int, theta: float) -> dict[str, JsonValue]:
    original = _original_context(rope, config)
    factor = rope.positive("factor", default=config.integer("max_position_embeddings") / original)
    fast, slow = rope.positive("beta_fast", default=32.0), rope.positive("beta_slow", default=1.0)
    if theta == 1.0:
        raise rope.error("rope_theta", "is 1; yarn needs wavelengths that differ")

    def dimension(rotations: float) -> float:
        return rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(fast), dimension(slow)
    if rope.boolean("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    return {
        "factor": repr(factor),
        "ramp_low": repr(float(max(low, 0))),
        "ramp_high": repr(float(min(high, rotary_dim - 1))),
        "attention_factor": repr(_yarn_attention(rope, factor)),
    }


def _yarn_attention(rope: ConfigReader, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.has("attention_factor"):
        return rope.positive("attention_factor")
    if rope.raw("mscale") and rope.raw("mscale_all_dim"):
        return mscale(rope.positive("mscale")) / mscale(rope.positive("mscale_all_dim"))
    return mscale(1.0)


def _dynamic(rope: ConfigReader, config: ConfigReader, rotary_dim: int) -> dict[str, JsonValue]:
    original = config.integer("max_position_embeddings")
    if rotary_dim <= 2:
        raise config.error("head_dim", f"leaves {rotary_dim} rotated dimensions; dynamic rope needs more")
    if _dynamic_context(rope, config) == original:
        return {"type": "default"}  # nothing is ever scaled
    return {"factor": repr(rope.positive("factor")), "original_context_length": original}


def _dynamic_context(rope: ConfigReader, config: ConfigReader) -> int:
    """Tokens of context: the factor says how much longer than max_position_embeddings."""
    original = config.integer("max_position_embeddings")
    return max(original, min(int(original * rope.positive("factor")), _MAX_CONTEXT))


def _longrope(
    rope: ConfigReader, config: ConfigReader, rotary_dim: int, form: RopeForm
) -> dict[str, JsonValue]:
    original, context = _original_context(rope, config), config.integer("max_position_embeddings")
    factor = rope.positive("factor", default=context / original)
    short = _factors(rope, "short_factor", rotary_dim)
    if original <= 1:
        raise rope.error("original_max_position_embeddings", f"is {original}")
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    attention = repr(rope.positive("attention_factor", default=default))
    if original >= context:  # no sequence is long
        return {"factors": short, "attention_factor": attention}
    found: dict[str, JsonValue] = {
        "short_factors": short,
        "long_factors": _factors(rope, "long_factor", rotary_dim),
        "original_context_length": original,
        "attention_factor": attention,
    }
    return {**found, "growth": "recompute"} if form.recomputes else found


def _factors(rope: ConfigReader, key: str, rotary_dim: int) -> list[JsonValue]:
    """A factor for each pair of dimensions."""
    factors = rope.raw(key)
    if not isinstance(factors, list) or len(factors) != rotary_dim // 2:
        raise rope.error(key, f"is not a list of {rotary_dim // 2} numbers")
    reader = ConfigReader(dict(_by_index(factors)), where=f"config.json: rope parameters: {key}")
    values = [reader.positive(str(i)) for i in range(len(factors))]
    if max(values) > _MAX_FACTOR:
        raise rope.error(key, f"holds {max(values)}, above {_MAX_FACTOR:g}")
    return [repr(value) for value in values]


def _by_index(values: list[object]) -> Iterator[tuple[str, object]]:
    """Items by their index, as a config reader takes them."""
    return ((str(i), value) for i, value in enumerate(values))


def _original_context(rope: ConfigReader, config: ConfigReader) -> int:
    """Tokens of context of the first training."""
    context = config.integer("max_position_embeddings")
    original = rope.integer("original_max_position_embeddings", default=context)
    # Phi-like configs keep it outside; transformers lets that value win.
    return config.integer("original_max_position_embeddings", default=original)


def _kind(rope: ConfigReader, form: RopeForm) -> str:
    kind = rope.text("rope_type", default=rope.text("type", default="default"))
    return dict(form.aliases).get(kind, kind)


def served_context(config: ConfigReader, form: RopeForm) -> tuple[int, tuple[str, ...]]:
    """Return how many tokens of context there are, and what to note about it."""
    context = config.integer("max_position_embeddings")
    if is_by_layer_type(config):
        return context, ()
    rope = ConfigReader(_rope_values(config), where="config.json: rope parameters")
    kind = _kind(rope, form)
    if kind != "dynamic":
        return context, ()
    extended = _dynamic_context(rope, config)
    if extended == context:
        return context, ()
    return extended, (
        f"served up to {extended} tokens of context: dynamic rope extends the {context} of config.json",
    )
