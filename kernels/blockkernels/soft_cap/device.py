"""Triton code of soft caps, for kernels that bound what they compute."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """The hyperbolic tangent, float32; exact to 1e-6 of 1."""
    size = tl.exp(-2.0 * tl.abs(x))
    value = (1.0 - size) / (1.0 + size)
    return tl.where(x < 0.0, -value, value)


@triton.jit
def capped(x, cap):
    """cap * tanh(x / cap)."""
    return cap * tanh(x / cap)
