"""RMSNorm in one pass over the data."""

from __future__ import annotations

import torch
from torch import Tensor

from blockkernels.native import has_dtype, library, threads_for
from blockkernels.rms_norm.reference import rms_norm_reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same as `rms_norm_reference`, with the rounding that it has in 16-bit types.

    The C kernel sums the squares in another order than torch, so a result in a 16-bit type may be one
    unit in the last place away. A row's result does not depend on the rows beside it.
    """
    native = library() if has_dtype(x) and weight.dtype in (x.dtype, torch.float32) else None
    if native is not None and x.dim() in (2, 3) and x.stride(-1) == 1:
        size = x.shape[-1]
        heads, head_stride = (1, 0) if x.dim() == 2 else (x.shape[1], x.stride(1))
        y = torch.empty(x.shape, dtype=x.dtype)
        places = (x.data_ptr(), weight.data_ptr(), y.data_ptr())
        strides = (x.stride(0), head_stride)
        call = native.rms_norm[x.dtype] if x.dtype == weight.dtype else native.rms_norm_wide
        call(*places, x.shape[0], heads, size, *strides, eps, threads_for(x.numel()))
        return y
    if x.dtype == torch.float32:
        return torch.rms_norm(x, (x.shape[-1],), weight, eps)
    # Torch's fused operation skips the rounding before the multiplication, which the model families have.
    return rms_norm_reference(x, weight, eps)
