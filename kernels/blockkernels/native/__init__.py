"""The C kernels of the operations: built by the system's compiler on first use, or not used at all."""

from blockkernels.native.library import address, has_dtype, library

__all__ = ["address", "has_dtype", "library"]
