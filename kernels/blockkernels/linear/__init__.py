"""Matrix products with weights that are laid out once for the processor."""

from blockkernels.linear.kernel import PackedLinear, can_pack
from blockkernels.linear.plain import Linear, PlainLinear
from blockkernels.linear.reference import linear_reference

__all__ = ["Linear", "PackedLinear", "PlainLinear", "can_pack", "linear_reference"]
