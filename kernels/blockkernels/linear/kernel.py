"""Linear layers on oneDNN's blocked weight layout."""

from __future__ import annotations

import torch
from torch import Tensor

from blockkernels.linear.reference import linear_reference

_PACKABLE = (torch.float32, torch.bfloat16)
_SPLIT_FEATURES = 1024
"""From about this many inputs on, oneDNN splits the sum of a single row; two rows are as fast or faster."""


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of this dtype on this device gain from oneDNN's layout."""
    if device.type != "cpu" or dtype not in _PACKABLE or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


class PackedLinear:
    """y = x @ weight.T + bias with the weight reordered once.

    The plain weight is not kept: on the CPU a layer exists in memory once, in
    the order the matrix product reads it. A row's result does not depend on how
    many rows are computed with it, with one exception: oneDNN may sum a single row
    in another order. An `exact` layer therefore computes at least two (held by
    tests/kernels/test_linear.py). Where packing does not apply, the plain weight is used as it is.

    Attributes:
        in_features, out_features: sizes.
        num_bytes: bytes of the resident weight and bias.
    """

    __slots__ = ("_alone", "_bias", "_packed", "_weight", "dtype", "in_features", "num_bytes", "out_features")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, exact: bool = False) -> None:
        """Take the weight [out, in] and the bias [out]; both may be freed by the caller afterwards."""
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._bias = bias
        self._packed = can_pack(weight.dtype, weight.device)
        self._alone = not exact and self.in_features < _SPLIT_FEATURES
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._weight = weight
        size = self.in_features * self.out_features + (0 if bias is None else self.out_features)
        self.num_bytes = size * self.dtype.itemsize

    def __call__(self, x: Tensor) -> Tensor:
        """Shape: x [tokens, in], result [tokens, out]."""
        if self._packed:
            rows = x if self._alone or x.shape[0] != 1 else x.expand(2, -1)
            result: Tensor = torch.ops.mkldnn._linear_pointwise(
                rows, self._weight, self._bias, "none", [], ""
            )
            return result[: x.shape[0]]
        return linear_reference(x, self._weight, self._bias)
