"""Matrix products with weights that are laid out once for the processor."""

from blockkernels.linear.kernel import PackedLinear, can_pack
from blockkernels.linear.reference import linear_reference

__all__ = ["PackedLinear", "can_pack", "linear_reference"]
