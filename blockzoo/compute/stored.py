"""How tensors of blocks are stored: the types in which they are read, and the names of quantised weights.

A linear module has either `MODULE.weight` or, quantised, `MODULE.int8` with `MODULE.int8_scale`; see
`blockkernels.linear.int8`. Programs that know only weights ask for the weight, so they refuse such a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from blockkernels.linear import Int8Weight, dequantise_int8
from blockzoo.manifest import INT8, INT8_SCALE, BlockManifest, DType, TensorRef

TORCH_DTYPES = {
    DType.F64: torch.float64,
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.I8: torch.int8,
}
"""Types of stored tensors that blocks are computed from."""

_WIDE = (".lora_bias", ".magnitude", f".{INT8_SCALE}")
"""Tensors that are computed with in float32, whatever the rest is."""


def computed_type(name: str, ref: TensorRef, dtype: torch.dtype) -> torch.dtype:
    """Return the type that a tensor of a block has in memory when the block is computed in `dtype`."""
    if ref.dtype == DType.I8:
        return torch.int8
    return torch.float32 if name.endswith(_WIDE) else dtype


def compute_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the type that a block with these tensors is computed in, which is that of its hidden states."""
    plain = (tensor.dtype for name, tensor in tensors.items() if not name.endswith(_WIDE))
    return next((dtype for dtype in plain if dtype != torch.int8), torch.float32)


def is_quantised(names: Mapping[str, object], module: str) -> bool:
    """Tell whether a module of a block has a quantised weight; `names` holds the names of its tensors."""
    return f"{module}.{INT8}" in names


def weight_names(block: BlockManifest) -> list[str]:
    """Return the names of a block's tensors as if no weight were quantised."""
    names = (name for name in block.tensors if not name.endswith(f".{INT8_SCALE}"))
    return [name.removesuffix(INT8) + "weight" if name.endswith(f".{INT8}") else name for name in names]


def int8_weight(tensors: Mapping[str, Tensor], modules: tuple[str, ...]) -> Int8Weight:
    """Return one weight for modules whose rows of the result stand one after the other.

    Raises:
        KeyError: one of them is not quantised.
    """
    values = [tensors[f"{module}.{INT8}"] for module in modules]
    scales = [tensors[f"{module}.{INT8_SCALE}"] for module in modules]
    return (
        Int8Weight(torch.cat(values), torch.cat(scales)) if len(modules) > 1 else Int8Weight(*values, *scales)
    )


def read_weight(
    block: BlockManifest, module: str, dtype: torch.dtype, read: Callable[[TensorRef, torch.dtype], Tensor]
) -> Tensor:
    """Read the weight [out, in] of a module, which a quantised one only stands for.

    Raises:
        KeyError: there is none.
    """
    if not is_quantised(block.tensors, module):
        return read(block.tensors[f"{module}.weight"], dtype)
    values = read(block.tensors[f"{module}.{INT8}"], torch.int8)
    scales = read(block.tensors[f"{module}.{INT8_SCALE}"], torch.float32)
    return dequantise_int8(Int8Weight(values, scales)).to(dtype)
