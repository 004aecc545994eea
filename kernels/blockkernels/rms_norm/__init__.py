"""Root-mean-square normalisation over the last dimension."""

from blockkernels.rms_norm.kernel import rms_norm
from blockkernels.rms_norm.reference import rms_norm_reference

__all__ = ["rms_norm", "rms_norm_reference"]
