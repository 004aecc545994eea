"""Rotary position embedding."""

from blockkernels.rotary.kernel import rotary
from blockkernels.rotary.reference import RopeParameters, inverse_frequencies, rotary_reference, rotary_table
from blockkernels.rotary.table import RotaryTable

__all__ = [
    "RopeParameters",
    "RotaryTable",
    "inverse_frequencies",
    "rotary",
    "rotary_reference",
    "rotary_table",
]
