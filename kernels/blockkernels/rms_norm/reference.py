"""RMSNorm as the model families define it (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise rows to unit root mean square, then scale.

    Semantics:
        y[t] = weight * round(x[t] * rsqrt(mean(x[t] ** 2) + eps)), inside in float32,
        rounded to x's dtype before the multiplication with weight; after it where the weight is float32
        and x is not.

    Shape: x [..., hidden], weight [hidden], result like x. DType: any float; weight as x, or float32.
    """
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight.dtype == torch.float32:
        return (weight * wide).to(x.dtype)
    return weight * wide.to(x.dtype)
