"""The rotation in one pass over the data."""

from __future__ import annotations

import torch
from torch import Tensor

from blockkernels.native import has_dtype, library, threads_for
from blockkernels.rotary.reference import rotary_reference


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, neighbours: bool = False) -> Tensor:
    """Same as `rotary_reference`, bit for bit."""
    native = library() if has_dtype(x) and cos.dtype in (x.dtype, torch.float32) else None
    if native is None or x.stride(2) != 1 or not (cos.is_contiguous() and sin.is_contiguous()):
        return rotary_reference(x, cos, sin, neighbours=neighbours)
    tokens, heads, head_dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype)
    call = native.rotary[x.dtype] if x.dtype == cos.dtype else native.rotary_wide
    call(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        y.data_ptr(),
        tokens,
        heads,
        cos.shape[-1],
        head_dim,
        x.stride(0),
        x.stride(1),
        neighbours,
        threads_for(x.numel()),
    )
    return y
