"""Soft caps, spelled out (Bello et al. 2016, "Neural combinatorial optimization", section 5.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_cap_reference(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), each step rounded to x's dtype.

    Shape: x of any, result like x.
    """
    return torch.tanh(x / cap) * cap
