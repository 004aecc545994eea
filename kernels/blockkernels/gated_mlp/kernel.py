"""The gated activation in one pass over the data."""

from __future__ import annotations

import torch
from torch import Tensor

from blockkernels.gated_mlp.reference import gated_activation_reference
from blockkernels.native import has_dtype, library, threads_for


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """Same as `gated_activation_reference`; SiLU within two units in the last place of float32.

    Raises:
        KeyError: the activation is not in `ACTIVATIONS`.
    """
    native = library() if activation == "silu" and has_dtype(gate_up) else None
    if native is None or gate_up.stride(1) != 1:
        return gated_activation_reference(gate_up, activation)
    tokens, wide = gate_up.shape
    y = torch.empty(tokens, wide // 2, dtype=gate_up.dtype)
    native.gated_silu[gate_up.dtype](
        gate_up.data_ptr(), y.data_ptr(), tokens, wide // 2, gate_up.stride(0), threads_for(y.numel())
    )
    return y
