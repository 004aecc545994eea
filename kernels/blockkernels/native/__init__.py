"""The C kernels of the operations: built by the system's compiler on first use, or not used at all."""

from blockkernels.native.loader import Functions, NativeLibrary, has_dtype, library, threads_for

__all__ = ["Functions", "NativeLibrary", "has_dtype", "library", "threads_for"]
