"""Linear layers on weights that are laid out for the processor: by our C kernel, or by oneDNN."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from blockkernels.linear.reference import linear_reference
from blockkernels.native import NativeLibrary, library

_PACKABLE = (torch.float32, torch.bfloat16)
_SPLIT_FEATURES = 1024
"""From about this many inputs on, oneDNN splits the sum of a single row; two rows are as fast or faster."""


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of this dtype on this device gain from a layout of their own."""
    if _native(dtype, device) is not None:
        return True
    if device.type != "cpu" or dtype not in _PACKABLE or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


def _native(dtype: torch.dtype, device: torch.device) -> NativeLibrary | None:
    """The C kernels, where they have products for this dtype."""
    native = library() if device.type == "cpu" and dtype == torch.bfloat16 else None
    return native if native is not None and native.linear_panel else None


class _Job(ctypes.Structure):
    """`linear_job` of native/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("x_stride", "y_stride", "tokens", "inner", "outer", "threads")),
    )


class PackedLinear:
    """y = x @ weight.T + bias with the weight reordered once.

    The plain weight is not kept: on the CPU a layer exists in memory once, in the order the matrix product
    reads it. Our C kernel computes bfloat16 where the processor multiplies pairs of it (AVX512-BF16), with
    its matrix unit where it has one (AMX); oneDNN computes the rest. A row's result does not depend on how
    many rows are computed with it, with one exception: oneDNN may sum a single row in another order. An
    `exact` layer therefore computes at least two (held by tests/kernels/test_linear.py). Where packing does
    not apply, the plain weight is used as it is.

    Attributes:
        in_features, out_features: sizes.
        num_bytes: bytes of the resident weight and bias.
        panels: the weight as the C kernel reads it, [panels, in / 2, panel, 2]; None where it does not.
        bias: [out] or None.
    """

    __slots__ = (
        "_alone",
        "_native",
        "_packed",
        "_weight",
        "bias",
        "dtype",
        "in_features",
        "num_bytes",
        "out_features",
        "panels",
    )

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, exact: bool = False) -> None:
        """Take the weight [out, in] and the bias [out]; both may be freed by the caller afterwards."""
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.bias = bias
        self.panels: Tensor | None = None
        self._native = _native(weight.dtype, weight.device) if self.in_features % 2 == 0 else None
        self._packed = self._native is None and can_pack(weight.dtype, weight.device)
        self._alone = not exact and self.in_features < _SPLIT_FEATURES
        size = self.in_features * self.out_features
        if self._native is not None:
            weight = self.panels = _in_panels(weight, self._native.linear_panel)
            size = weight.numel()
        elif self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._weight = weight
        self.num_bytes = (size + (0 if bias is None else self.out_features)) * self.dtype.itemsize

    def __call__(self, x: Tensor) -> Tensor:
        """Shape: x [tokens, in], result [tokens, out]."""
        if self._native is not None:
            return self._multiply(self._native, x)
        if self._packed:
            rows = x if self._alone or x.shape[0] != 1 else x.expand(2, -1)
            result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self.bias, "none", [], "")
            return result[: x.shape[0]]
        return linear_reference(x, self._weight, self.bias)

    def _multiply(self, native: NativeLibrary, x: Tensor) -> Tensor:
        assert x.dtype == self.dtype
        if x.stride(1) != 1:
            x = x.contiguous()
        y = torch.empty(x.shape[0], self.out_features, dtype=self.dtype)
        job = _Job(
            x.data_ptr(),
            self._weight.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            y.data_ptr(),
            x.stride(0),
            self.out_features,
            x.shape[0],
            self.in_features,
            self.out_features,
            torch.get_num_threads(),
        )
        native.linear(ctypes.byref(job))
        return y


def _in_panels(weight: Tensor, panel: int) -> Tensor:
    """A weight [out, in] as [panels, in / 2, panel, 2]; outputs behind the last are zero."""
    outer, inner = weight.shape
    missing = -outer % panel
    if missing:
        weight = torch.cat([weight, weight.new_zeros(missing, inner)])
    return weight.reshape(-1, panel, inner // 2, 2).permute(0, 2, 1, 3).contiguous()
