"""The rotation in one pass over the data."""

from __future__ import annotations

import torch
from torch import Tensor

from blockkernels.native import has_dtype, library, threads_for
from blockkernels.rotary.reference import rotary_reference


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Same as `rotary_reference`, bit for bit."""
    native = library() if has_dtype(x) and x.dtype == cos.dtype else None
    if native is None or x.stride(2) != 1 or not (cos.is_contiguous() and sin.is_contiguous()):
        return rotary_reference(x, cos, sin)
    tokens, heads, head_dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype)
    native.rotary[x.dtype](
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        y.data_ptr(),
        tokens,
        heads,
        head_dim // 2,
        x.stride(0),
        x.stride(1),
        threads_for(x.numel()),
    )
    return y
