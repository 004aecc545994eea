"""Values kept within a bound by a hyperbolic tangent."""

from blockkernels.soft_cap.kernel import soft_cap
from blockkernels.soft_cap.reference import soft_cap_reference

__all__ = ["soft_cap", "soft_cap_reference"]
