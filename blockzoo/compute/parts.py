"""What blocks of every kind are made of: values of their config, and their linear maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from blockkernels.backends import Backend
from blockkernels.linear import Linear
from blockkernels.rotary import RopeParameters
from blockzoo.compute.stored import int8_weight, is_quantised
from blockzoo.errors import InvalidConfigError
from blockzoo.manifest import INT8, JsonValue


def rope_parameters(config: Mapping[str, JsonValue]) -> RopeParameters | None:
    """Rotary parameters of a layer's config; None for a layer without positions, whose `rope` is null.

    Raises:
        InvalidConfigError: there are none, or a value is no number.
        KeyError: a value is missing; `build_block` turns it into InvalidConfigError.
    """
    rope = config["rope"]
    if rope is None:
        return None
    if not isinstance(rope, dict):
        raise InvalidConfigError("layer config has no rope parameters")
    kind = str(rope["type"])
    head_dim = integer(config, "head_dim")
    rotary_dim = integer(rope, "rotary_dim") if "rotary_dim" in rope else head_dim
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise InvalidConfigError(
            f"rope parameters: {rotary_dim} of {head_dim} dimensions cannot be rotated in pairs",
            field="rotary_dim",
        )
    parameters = RopeParameters(
        rotary_dim,
        real(rope, "theta"),
        neighbours=rope.get("pairs") == "neighbours",
        wide=rope.get("angles") == "float32",
    )
    if kind == "default":
        return parameters
    if kind == "linear":
        return replace(parameters, kind=kind, factor=real(rope, "factor"))
    if kind == "yarn":
        return replace(
            parameters,
            kind=kind,
            factor=real(rope, "factor"),
            ramp=(real(rope, "ramp_low"), real(rope, "ramp_high")),
            scale=real(rope, "attention_factor"),
        )
    if kind == "dynamic":
        original = integer(rope, "original_context_length")
        return replace(parameters, kind=kind, factor=real(rope, "factor"), original_context=original)
    if kind == "longrope":
        return _longrope(rope, parameters)
    return replace(
        parameters,
        kind=kind,
        factor=real(rope, "factor"),
        low_freq_factor=real(rope, "low_freq_factor"),
        high_freq_factor=real(rope, "high_freq_factor"),
        original_context=integer(rope, "original_context_length"),
    )


def _longrope(rope: Mapping[str, JsonValue], parameters: RopeParameters) -> RopeParameters:
    """With `factors` for all sequences, or other ones for short and for long sequences.

    Older programs ask for `factors`, so they refuse a block that they would compute as if it were short.
    """
    found = replace(parameters, kind="longrope", scale=real(rope, "attention_factor"))
    if "factors" in rope:
        return replace(found, factors=_factors(rope, "factors", parameters))
    return replace(
        found,
        factors=_factors(rope, "short_factors", parameters),
        long_factors=_factors(rope, "long_factors", parameters),
        original_context=integer(rope, "original_context_length"),
        recomputes=rope.get("growth") == "recompute",
    )


def _factors(rope: Mapping[str, JsonValue], key: str, parameters: RopeParameters) -> tuple[float, ...]:
    factors = rope[key]
    if not isinstance(factors, list) or len(factors) * 2 != parameters.rotary_dim:
        raise InvalidConfigError("rope parameters: not a factor for each pair of dimensions")
    return tuple(float(str(factor)) for factor in factors)


NORM_KINDS = ("rounded", "wide", "centred")
"""How a norm applies its weight; see `Norms`."""


class Norms:
    """The norms of a block: their epsilon, and how their weights are applied.

    "rounded" rounds before the product with the weight, as Llama does. "wide" multiplies in float32 and
    rounds once. "centred" is the same with 1 + weight.

    Attributes:
        eps: of all of them.
    """

    def __init__(self, config: Mapping[str, JsonValue]) -> None:
        """Read `norm`, or `norm_eps` for "rounded" ones.

        A block that older programs would compute wrongly has no `norm_eps`, which they ask for.

        Raises:
            InvalidConfigError: a kind that this version does not know.
            KeyError: there is neither.
        """
        norm = config.get("norm")
        if not isinstance(norm, dict):
            norm = {"eps": config["norm_eps"]}
        self.eps = real(norm, "eps")
        self._kind = str(norm.get("kind", "rounded"))
        if self._kind not in NORM_KINDS:
            raise InvalidConfigError(
                f"norms of kind {self._kind[:80]!r} cannot be run by this version",
                hint="Upgrade blockzoo on this machine.",
            )

    def weight(self, stored: Tensor) -> Tensor:
        """A stored weight as `rms_norm` takes it."""
        if self._kind == "rounded":
            return stored
        wide = stored.to(torch.float32)
        return wide + 1 if self._kind == "centred" else wide


def fused(
    tensors: Mapping[str, Tensor], modules: tuple[str, ...], backend: Backend, *, exact: bool
) -> Linear:
    """One linear map for modules that read the same input; a missing bias counts as zero.

    Args:
        tensors: of the block; `MODULE.weight` [out, in] and perhaps `MODULE.bias` [out], of one dtype, or a
            quantised weight (see `blockzoo.compute.stored`), then of all modules.
        modules: whose rows of the result stand one after the other.
        backend: lays the weight out.
        exact: see `blockzoo.compute.build.build_block`.

    Raises:
        KeyError: a module has no weight.
    """
    quantised = is_quantised(tensors, modules[0])
    weights = [tensors[f"{module}.{INT8 if quantised else 'weight'}"] for module in modules]
    bias = _joined([tensors.get(f"{module}.bias") for module in modules], [len(weight) for weight in weights])
    if quantised:
        return backend.linear_int8(int8_weight(tensors, modules), bias)
    return backend.linear(weights[0] if len(weights) == 1 else torch.cat(weights), bias, exact=exact)


def _joined(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    some = next((bias for bias in biases if bias is not None), None)
    if some is None:
        return None
    parts = zip(biases, sizes, strict=True)
    return torch.cat([some.new_zeros(size) if bias is None else bias for bias, size in parts])


def integer(config: Mapping[str, JsonValue], key: str) -> int:
    """The integer under `key` of a block's config; raises InvalidConfigError, KeyError when it is missing."""
    value = config[key]
    if not isinstance(value, int):
        raise InvalidConfigError(f"block config {key!r} is {value!r}, not an integer", field=key)
    return value


def optional(config: Mapping[str, JsonValue], key: str) -> float | None:
    """The number under `key` of a block's config, None when it is missing; raises InvalidConfigError."""
    return real(config, key) if key in config else None


def real(config: Mapping[str, JsonValue], key: str) -> float:
    """The number under `key` of a block's config, numerals in strings too.

    Raises:
        InvalidConfigError: it is no number.
        KeyError: it is missing.
    """
    try:
        return float(cast(str, config[key]))
    except (TypeError, ValueError) as error:
        raise InvalidConfigError(
            f"block config {key!r} is {config[key]!r}, not a number", field=key
        ) from error
