"""Rotary position embedding."""

from blockkernels.rotary.kernel import rotary
from blockkernels.rotary.reference import RopeParameters, inverse_frequencies, rotary_reference, rotary_table

__all__ = ["RopeParameters", "inverse_frequencies", "rotary", "rotary_reference", "rotary_table"]
