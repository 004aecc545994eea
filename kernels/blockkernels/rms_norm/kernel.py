"""RMSNorm in one fused call where torch has it."""

from __future__ import annotations

import torch
from torch import Tensor

from blockkernels.rms_norm.reference import rms_norm_reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same as `rms_norm_reference`, bit for bit in 16-bit types.

    In float32 the fused operation replaces four passes over the data. In 16-bit
    types it would skip the rounding before the multiplication, which the model
    families have, so the reference runs.
    """
    if x.dtype == torch.float32:
        return torch.rms_norm(x, (x.shape[-1],), weight, eps)
    return rms_norm_reference(x, weight, eps)
