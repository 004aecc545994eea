"""The activation of a gated feed-forward block."""

from blockkernels.gated_mlp.kernel import gated_activation
from blockkernels.gated_mlp.reference import ACTIVATIONS, gated_activation_reference

__all__ = ["ACTIVATIONS", "gated_activation", "gated_activation_reference"]
