"""Matrix products with weights that are laid out once for the processor."""

from blockkernels.linear.int8 import (
    Int8Linear,
    Int8Weight,
    can_quantise,
    dequantise_int8,
    linear_int8_reference,
    quantise_int8,
)
from blockkernels.linear.kernel import PackedLinear, can_pack
from blockkernels.linear.plain import Linear, PlainLinear
from blockkernels.linear.reference import linear_reference

__all__ = [
    "Int8Linear",
    "Int8Weight",
    "Linear",
    "PackedLinear",
    "PlainLinear",
    "can_pack",
    "can_quantise",
    "dequantise_int8",
    "linear_int8_reference",
    "linear_reference",
    "quantise_int8",
]
