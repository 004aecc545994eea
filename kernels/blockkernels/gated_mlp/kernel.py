"""The gated activation in one pass over the data."""

from __future__ import annotations

import torch
from torch import Tensor

from blockkernels.gated_mlp.reference import gated_activation_reference
from blockkernels.native import Functions, has_dtype, library, threads_for

_NATIVE = {"silu": "gated_silu", "gelu_pytorch_tanh": "gated_gelu"}
"""Activations that a C kernel computes."""


def gated_activation(gate_up: Tensor, activation: str, *, exact: bool = False) -> Tensor:
    """Same as `gated_activation_reference`; SiLU and GELU by tanh within a few units in the last place.

    With `exact` a row's result does not depend, in any bit, on the rows beside it. Torch computes what is
    left over behind its vectors in another way, and where that falls depends on the batch.

    Raises:
        KeyError: the activation is not in `ACTIVATIONS`.
    """
    native = library() if activation in _NATIVE and has_dtype(gate_up) else None
    if native is None or gate_up.stride(1) != 1:
        parts = gate_up.split(1) if exact else (gate_up,)
        return torch.cat([gated_activation_reference(part, activation) for part in parts])
    tokens, wide = gate_up.shape
    y = torch.empty(tokens, wide // 2, dtype=gate_up.dtype)
    functions: Functions = getattr(native, _NATIVE[activation])
    functions[gate_up.dtype](
        gate_up.data_ptr(), y.data_ptr(), tokens, wide // 2, gate_up.stride(0), threads_for(y.numel())
    )
    return y
