"""The gated activation against transformers' activation modules."""

import pytest
import torch
from transformers.activations import ACT2FN

from blockkernels.gated_mlp import ACTIVATIONS, gated_activation, gated_activation_reference


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_is_the_models(name: str) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(5, 2 * 63)
    want = ACT2FN[name](gate_up[:, :63]) * gate_up[:, 63:]
    torch.testing.assert_close(gated_activation(gate_up, name), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_is_the_reference_and_exact_rows_stand_alone(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    gate_up = 8 * torch.randn(700, 2 * 117).to(dtype)
    whole = gated_activation(gate_up, name, exact=True)
    torch.testing.assert_close(whole, gated_activation_reference(gate_up, name), rtol=2e-2, atol=1e-4)
    for start, end in ((0, 1), (5, 12), (600, 700)):
        assert torch.equal(gated_activation(gate_up[start:end], name, exact=True), whole[start:end])


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
def test_values_without_bounds(name: str) -> None:
    gate = torch.tensor([float("nan"), float("inf"), -float("inf"), 500.0, -500.0, 0.0, 1e-30, -80.0] * 3)
    gate_up = torch.cat((gate, torch.ones(24)))[None]
    got, want = gated_activation(gate_up, name), gated_activation_reference(gate_up, name)
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_float32_is_near_the_reference_in_float64(name: str) -> None:
    gate = torch.cat((torch.linspace(-9, 9, 4001), torch.logspace(-9, 0, 500)))
    gate_up = torch.stack((gate, torch.ones(len(gate))))[None].flatten(1)
    got, want = gated_activation(gate_up, name), gated_activation_reference(gate_up.double(), name)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)


def test_the_input_is_left_alone() -> None:
    gate_up = torch.randn(2, 8)
    before = gate_up.clone()
    gated_activation(gate_up, "silu")
    assert torch.equal(gate_up, before)
