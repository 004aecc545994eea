"""Matrix products by Triton: plain weights of any float type, and int8 weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockkernels.launching import launch, parts_of, power_of_two
from blockkernels.linear.device import int8_kernel, linear_kernel, round_rows_kernel, sum_parts_kernel
from blockkernels.linear.int8 import TINY, Int8Weight

_FEW = 16
"""Tokens up to which a product takes the time of reading its weight."""
_PROGRAMS = 256
"""Programs that keep a device busy; fewer are split."""
_MOST_SPLITS = 8
_SUM_BLOCK = 512
_ROUNDED = 64
"""Blocks of 64 inputs that are rounded at a time: their lanes are exchanged through shared memory."""


@dataclass(frozen=True, slots=True)
class _Tile:
    """Sizes of a program's part of a product: tokens, outputs, inputs at a time, copies ahead, warps."""

    tokens: int
    outputs: int
    inputs: int
    stages: int
    warps: int


def _tile(tokens: int, itemsize: int) -> _Tile:
    """Chosen by the number of tokens alone; elements of four bytes take half the inputs at a time."""
    inputs = 128 // itemsize
    if tokens <= _FEW:
        return _Tile(16, 64, 2 * inputs, 4, 4)
    if tokens <= 4 * _FEW:
        return _Tile(64, 64, inputs, 4, 4)
    return _Tile(128, 128, inputs, 3, 8)


def splits_of(tokens: int, in_features: int, out_features: int, itemsize: int) -> int:
    """Parts that a product's inputs are split into, where its tiles alone would not keep a device busy."""
    tile = _tile(tokens, itemsize)
    tiles = max(1, parts_of(out_features, tile.outputs) * parts_of(tokens, tile.tokens))
    return max(1, min(_MOST_SPLITS, _PROGRAMS // tiles, parts_of(in_features, tile.inputs) // 2))


class TritonLinear:
    """y = x @ weight.T + bias, with the weight as it lies in the checkpoint.

    Sums are float32. Parts of a sum are added in a fixed order: the same batch gives the same bits.

    Attributes:
        in_features, out_features, num_bytes: see `blockkernels.linear.Linear`.
    """

    __slots__ = ("_bias", "_weight", "in_features", "num_bytes", "out_features")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Keep the weight [out, in] and the bias [out]."""
        self._weight = weight.contiguous()
        self._bias = None if bias is None else bias.contiguous()
        self.out_features, self.in_features = weight.shape
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """Shape: x [tokens, in], result [tokens, out]."""
        x = _rows(x)
        tokens, inner, outer = len(x), self.in_features, self.out_features
        y = torch.empty(tokens, outer, dtype=x.dtype, device=x.device)
        itemsize = self._weight.element_size()
        tile, split = _tile(tokens, itemsize), splits_of(tokens, inner, outer, itemsize)
        part = y
        if split > 1:
            part = torch.empty(split, tokens, outer, dtype=torch.float32, device=x.device)
        grid = (parts_of(tokens, tile.tokens), parts_of(outer, tile.outputs), split)
        launch(
            linear_kernel, grid, x, self._weight, self._bias, y, part, tokens, x.stride(0), y.stride(0),
            warps=tile.warps, IN=inner, OUT=outer, BLOCK_M=tile.tokens, BLOCK_N=tile.outputs,
            BLOCK_K=tile.inputs, SPLIT=split, STAGES=tile.stages,
        )  # fmt: skip
        if split > 1:
            launch(
                sum_parts_kernel, (tokens, parts_of(outer, _SUM_BLOCK)), part, self._bias, y, tokens,
                y.stride(0),
                OUT=outer, SPLIT=split, BLOCK=_SUM_BLOCK,
            )  # fmt: skip
        return y


class TritonInt8Linear:
    """y = x @ weight.T + bias by a quantised weight, with the bits of `linear_int8_reference`.

    Attributes:
        in_features, out_features, num_bytes: see `blockkernels.linear.Linear`.
    """

    __slots__ = ("_bias", "_weight", "in_features", "num_bytes", "out_features")

    def __init__(self, weight: Int8Weight, bias: Tensor | None = None) -> None:
        """Keep the weight and the bias [out]."""
        self._weight = Int8Weight(weight.values.contiguous(), weight.scales.contiguous())
        self._bias = bias
        self.out_features, self.in_features = weight.values.shape
        extra = 0 if bias is None else bias.nbytes
        self.num_bytes = weight.values.nbytes + weight.scales.nbytes + extra

    def __call__(self, x: Tensor) -> Tensor:
        """Shape: x [tokens, in], result [tokens, out]."""
        x = _rows(x)
        tokens, inner, outer = len(x), self.in_features, self.out_features
        rounded = torch.empty(tokens, inner, dtype=torch.int8, device=x.device)
        steps = torch.empty(tokens, dtype=torch.float32, device=x.device)
        blocks = min(_ROUNDED, power_of_two(inner // 64))
        launch(
            round_rows_kernel, (tokens,), x, rounded, steps, x.stride(0),
            warps=min(16, max(1, blocks // 8)), contracts=False, IN=inner, BLOCKS=blocks, TINY=TINY,
        )  # fmt: skip
        y = torch.empty(tokens, outer, dtype=x.dtype, device=x.device)
        tile = _tile(tokens, 1)
        grid = (parts_of(tokens, tile.tokens), parts_of(outer, tile.outputs))
        bias = None if self._bias is None else self._bias.to(x.dtype)
        launch(
            int8_kernel, grid, rounded, steps, self._weight.values, self._weight.scales, bias, y, tokens,
            y.stride(0), warps=tile.warps, contracts=False, IN=inner, OUT=outer, BLOCK_M=tile.tokens,
            BLOCK_N=tile.outputs, BLOCK_K=128, STAGES=tile.stages,
        )  # fmt: skip
        return y


def _rows(x: Tensor) -> Tensor:
    """The same values with the elements of a row beside each other."""
    return x if x.stride(1) == 1 else x.contiguous()
