"""Gated activations by Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from blockkernels.gated_mlp.device import gated_kernel
from blockkernels.launching import launch, parts_of

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
"""Those that the kernel computes."""
_BLOCK = 1024


def gated_activation_gpu(gate_up: Tensor, activation: str) -> Tensor:
    """Same as `gated_activation_reference`, within units in the last place.

    Shape: gate_up [tokens, 2 * intermediate], result [tokens, intermediate].
    """
    tokens, wide = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    y = torch.empty(tokens, wide, dtype=gate_up.dtype, device=gate_up.device)
    grid = (tokens, parts_of(wide, _BLOCK))
    launch(gated_kernel, grid, gate_up, y, gate_up.stride(0), WIDE=wide, ACTIVATION=activation, BLOCK=_BLOCK)
    return y
