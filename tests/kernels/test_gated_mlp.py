"""The gated activation against transformers' activation modules."""

import pytest
import torch
from transformers.activations import ACT2FN

from blockkernels.gated_mlp import ACTIVATIONS, gated_activation


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_is_the_models(name: str) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(5, 2 * 63)
    want = ACT2FN[name](gate_up[:, :63]) * gate_up[:, 63:]
    torch.testing.assert_close(gated_activation(gate_up, name), want)


def test_the_input_is_left_alone() -> None:
    gate_up = torch.randn(2, 8)
    before = gate_up.clone()
    gated_activation(gate_up, "silu")
    assert torch.equal(gate_up, before)
