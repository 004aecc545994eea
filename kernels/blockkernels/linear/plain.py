"""The protocol of linear layers, and a layer that keeps its weight in the layout of the checkpoint."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from blockkernels.linear.reference import linear_reference


class Linear(Protocol):
    """y = x @ weight.T + bias, in whatever layout the weight is: packed, quantised, as in the checkpoint."""

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        ...

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of the resident weight and bias."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Shape: x [tokens, in], result [tokens, out]."""
        ...


class PlainLinear:
    """A weight [out, in] in row-major order, multiplied by torch on any device.

    Attributes:
        in_features, out_features, num_bytes: see `Linear`.
    """

    __slots__ = ("_bias", "_weight", "in_features", "num_bytes", "out_features")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Keep the weight [out, in] and the bias [out]."""
        self._weight = weight
        self._bias = bias
        self.out_features, self.in_features = weight.shape
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """Shape: x [tokens, in], result [tokens, out]."""
        return linear_reference(x, self._weight, self._bias)
