"""Linear layers whose weights and activations are int8.

A weight [out, in] is rotated by a Hadamard matrix within blocks of 64 inputs and rounded with one scale for
each output; a row of activations is rotated in the same way and rounded with one scale for the row. The
rotations cancel out in the product. They spread single large activations over their block, which would
otherwise take the steps from all others (QuaRot, arXiv 2404.00456). Sums are integers, so results have the
same bits for any batch and on any processor.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from blockkernels.native import NativeLibrary, has_dtype, library

BLOCK = 64
"""Inputs that are rotated together; a layer has a multiple of them."""

MAX_IN = 1 << 17
"""Most inputs: int32 holds the sum of as many products of two bytes."""

TINY = 1e-30
"""A row whose rotated elements, times 8, are all at most this counts as zeros, so that nothing overflows."""

_PANEL, _WORD = 32, 4


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A quantised weight.

    Attributes:
        values: int8 [out, in], of the rotated weight, within -127 and 127.
        scales: float32 [out]; a value times its scale is an element of the rotated weight.
    """

    values: Tensor
    scales: Tensor


def can_quantise(in_features: int) -> bool:
    """Whether a layer with as many inputs can be int8."""
    return 0 < in_features <= MAX_IN and in_features % BLOCK == 0


def rotate(x: Tensor) -> Tensor:
    """Multiply blocks of 64 along the last dimension with the Hadamard matrix of Sylvester's order, over 8.

    The matrix is orthogonal and symmetric: to rotate twice gives x. Float32, in this order of additions on
    every device. Shape: x [..., in], result the same.
    """
    shape = x.shape
    values = x.float().reshape(-1, BLOCK)
    half = 1
    while half < BLOCK:
        pairs = values.reshape(values.shape[0], -1, 2, half)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        values = torch.stack((a + b, a - b), 2).reshape(-1, BLOCK)
        half *= 2
    return (values * 0.125).reshape(shape)


def quantise_int8(weight: Tensor) -> Int8Weight:
    """Round a weight [out, in] of any float type to nearest.

    Raises:
        ValueError: the number of inputs is not one that `can_quantise`.
    """
    if not can_quantise(weight.shape[1]):
        raise ValueError(f"{weight.shape[1]} inputs: int8 needs a multiple of {BLOCK}, at most {MAX_IN}")
    rotated = rotate(weight)
    scales = rotated.abs().amax(1) / 127.0
    steps = torch.where(scales > 0, scales, torch.ones_like(scales))
    return Int8Weight((rotated / steps[:, None]).round().clamp(-127, 127).to(torch.int8), scales)


def dequantise_int8(weight: Int8Weight) -> Tensor:
    """The weight that the values stand for, not rotated; float32 [out, in]."""
    return rotate(weight.values.float() * weight.scales[:, None])


def linear_int8_reference(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """The product that the kernels compute, bit for bit.

    Shape: x [tokens, in] float32, bfloat16 or float16, bias [out] or None, result [tokens, out] of x's type.
    The bias is rounded to x's type before it is added. A row with NaN or infinity gives NaN.
    """
    rotated = rotate(x)
    # The kernels divide by 8 at the end: a power of two changes no digit.
    largest = (rotated * 8.0).abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(1, keepdim=True)
    poison = (rotated * 0.0).sum(1, keepdim=True)
    # A number divided by a tensor would be a product with its reciprocal.
    inverse = torch.where(
        largest > TINY, torch.full_like(largest, 127.0) / largest, torch.zeros_like(largest)
    )
    rounded = (rotated * 8.0 * inverse).round().nan_to_num(nan=0.0).clamp(-127, 127)
    steps = (largest / 127.0 + poison) * 0.125
    sums = rounded.double() @ weight.values.double().T  # integers below 2**53, exact
    y = sums.float() * (steps * weight.scales)
    return (y if bias is None else y + bias.to(x.dtype).float()).to(x.dtype)


class _Job(ctypes.Structure):
    """`int8_job` of int8.c."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "weight", "sums", "scales", "bias", "y", "rounded", "steps")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("x_stride", "y_stride", "tokens", "inner", "outer", "is_bf16", "threads")
        ),
    )


class Int8Linear:
    """y = x @ weight.T + bias by a quantised weight: our C kernel on the CPU, else the reference.

    Attributes:
        in_features, out_features, num_bytes: see `blockkernels.linear.Linear`.
        bias: [out] or None.
        weight: the weight as it was given; None where the C kernel has a layout of its own.
        panels: that layout, int8 [panels, in / 4, 32, 4]; None where the reference computes.
        sums: of each output's values in it, int32 [panels * 32].
        scales: float32 [panels * 32]; zero behind the last output, as sums are.
    """

    __slots__ = (
        "_native",
        "bias",
        "in_features",
        "num_bytes",
        "out_features",
        "panels",
        "scales",
        "sums",
        "weight",
    )

    def __init__(self, weight: Int8Weight, bias: Tensor | None = None) -> None:
        """Lay out the weight; both may be freed by the caller afterwards."""
        self.out_features, self.in_features = weight.values.shape
        self.bias = bias
        self._native: NativeLibrary | None = library() if weight.values.device.type == "cpu" else None
        self.weight: Int8Weight | None = weight
        self.panels: Tensor | None = None
        extra = 0 if bias is None else bias.nbytes
        if self._native is None:
            self.num_bytes = weight.values.nbytes + weight.scales.nbytes + extra
            return
        missing = -self.out_features % _PANEL
        values = torch.cat([weight.values, weight.values.new_zeros(missing, self.in_features)])
        self.panels = (
            values.reshape(-1, _PANEL, self.in_features // _WORD, _WORD).transpose(1, 2).contiguous()
        )
        self.sums = values.sum(1, dtype=torch.int32)
        self.scales = torch.cat([weight.scales, weight.scales.new_zeros(missing)]).contiguous()
        self.weight = None
        self.num_bytes = values.nbytes + self.sums.nbytes + self.scales.nbytes + extra

    def __call__(self, x: Tensor) -> Tensor:
        """Shape: x [tokens, in], result [tokens, out] of x's type."""
        if self._native is None:
            assert self.weight is not None
            return linear_int8_reference(x, self.weight, self.bias)
        if not has_dtype(x):
            return self._multiply(self._native, x.float()).to(x.dtype)
        return self._multiply(self._native, x)

    def _multiply(self, native: NativeLibrary, x: Tensor) -> Tensor:
        panels = self.panels
        assert panels is not None
        if x.stride(1) != 1:
            x = x.contiguous()
        bias = None if self.bias is None else self.bias.to(x.dtype).contiguous()
        tokens = x.shape[0]
        y = torch.empty(tokens, self.out_features, dtype=x.dtype)
        rounded = torch.empty(tokens, self.in_features, dtype=torch.uint8)
        steps = torch.empty(tokens, dtype=torch.float32)
        job = _Job(
            x.data_ptr(),
            panels.data_ptr(),
            self.sums.data_ptr(),
            self.scales.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            rounded.data_ptr(),
            steps.data_ptr(),
            x.stride(0),
            self.out_features,
            tokens,
            self.in_features,
            self.out_features,
            x.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        native.linear_int8(ctypes.byref(job))
        return y
