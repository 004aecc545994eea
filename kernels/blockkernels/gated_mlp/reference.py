"""act(gate) * up, the middle of a gated feed-forward block (Shazeer 2020)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
}
"""Activations by their Hugging Face name."""


def gated_activation_reference(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate_up[:, :n]) * gate_up[:, n:].

    Shape: gate_up [tokens, 2 * intermediate], result [tokens, intermediate].

    Raises:
        KeyError: the activation is not in `ACTIVATIONS`.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate).mul_(up)
