"""What blocks of every kind are made of: values of their config, and their linear maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from blockkernels.backends import Backend
from blockkernels.linear import Linear
from blockkernels.rotary import RopeParameters
from blockzoo.errors import InvalidConfigError
from blockzoo.manifest import JsonValue


def rope_parameters(config: Mapping[str, JsonValue]) -> RopeParameters:
    """Rotary parameters of a layer's config.

    Raises:
        InvalidConfigError: there are none, or a value is no number.
        KeyError: a value is missing; `build_block` turns it into InvalidConfigError.
    """
    rope = config.get("rope")
    if not isinstance(rope, dict):
        raise InvalidConfigError("layer config has no rope parameters")
    kind = str(rope["type"])
    if kind == "default":
        return RopeParameters(integer(config, "head_dim"), real(rope, "theta"))
    if kind == "linear":
        return RopeParameters(
            integer(config, "head_dim"), real(rope, "theta"), kind, factor=real(rope, "factor")
        )
    return RopeParameters(
        integer(config, "head_dim"),
        real(rope, "theta"),
        kind,
        factor=real(rope, "factor"),
        low_freq_factor=real(rope, "low_freq_factor"),
        high_freq_factor=real(rope, "high_freq_factor"),
        original_context=integer(rope, "original_context_length"),
    )


def fused(
    tensors: Mapping[str, Tensor], modules: tuple[str, ...], backend: Backend, *, exact: bool
) -> Linear:
    """One linear map for modules that read the same input; a missing bias counts as zero.

    Args:
        tensors: of the block; `MODULE.weight` [out, in] and perhaps `MODULE.bias` [out], of one dtype.
        modules: whose rows of the result stand one after the other.
        backend: lays the weight out.
        exact: see `blockzoo.compute.build.build_block`.

    Raises:
        KeyError: a module has no weight.
    """
    weights = [tensors[f"{module}.weight"] for module in modules]
    biases = [tensors.get(f"{module}.bias") for module in modules]
    bias = None
    if any(part is not None for part in biases):
        bias = torch.cat(
            [
                weight.new_zeros(weight.shape[0]) if part is None else part
                for weight, part in zip(weights, biases, strict=True)
            ]
        )
    return backend.linear(weights[0] if len(weights) == 1 else torch.cat(weights), bias, exact=exact)


def integer(config: Mapping[str, JsonValue], key: str) -> int:
    """The integer under `key` of a block's config; raises InvalidConfigError, KeyError when it is missing."""
    value = config[key]
    if not isinstance(value, int):
        raise InvalidConfigError(f"block config {key!r} is {value!r}, not an integer", field=key)
    return value


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
