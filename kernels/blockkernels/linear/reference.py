"""The affine map of a linear layer."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[t, o] = sum_i x[t, i] * weight[o, i] + bias[o].

    Shape: x [tokens, in], weight [out, in], bias [out] or None, result [tokens, out].
    """
    return functional.linear(x, weight, bias)
