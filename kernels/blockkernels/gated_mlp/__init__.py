"""The activation of a gated feed-forward block."""

from blockkernels.gated_mlp.reference import ACTIVATIONS, gated_activation

__all__ = ["ACTIVATIONS", "gated_activation"]
