"""Rotary position embedding."""

from blockkernels.rotary.kernel import rotary
from blockkernels.rotary.reference import RopeParameters, inverse_frequencies, rotary_reference, rotary_table
from blockkernels.rotary.table import RotaryTable, RotaryTables

__all__ = [
    "RopeParameters",
    "RotaryTable",
    "RotaryTables",
    "inverse_frequencies",
    "rotary",
    "rotary_reference",
    "rotary_table",
]
