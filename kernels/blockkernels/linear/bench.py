"""Times packed weights against plain ones, and int8 against packed: `python -m blockkernels.linear.bench`.

The products of one SmolLM2 layer and of its head, for the batch sizes of decode and for a part of a prompt.
Int8 includes the rotation and rounding of the activations.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor

from blockkernels.linear import PackedLinear, linear_reference
from blockkernels.linear.int8 import Int8Linear, linear_int8_reference, quantise_int8
from blockkernels.native import library
from blockkernels.timing import Case, close, main

_SHAPES = {
    "qkv": (960, 576),
    "out": (576, 576),
    "gate+up": (3072, 576),
    "down": (576, 1536),
    "head": (49152, 576),
}


def cases() -> list[Case]:
    """Every product at batch 1, 8 and 32 in bf16."""
    torch.manual_seed(0)
    made = []
    for name, (outer, inner) in _SHAPES.items():
        weight = torch.randn(outer, inner).bfloat16()
        packed = PackedLinear(weight)
        for tokens in (1, 8, 32):
            x = torch.randn(tokens, inner).bfloat16()
            ours, plain = partial(packed, x), partial(linear_reference, x, weight)
            made.append(
                Case(
                    f"{name} {inner}x{outer} batch {tokens}",
                    ours,
                    plain,
                    "plain weight",
                    lambda ours=ours, want=plain: close(ours(), want(), 2e-2),  # type: ignore[misc]
                )
            )
        made += _int8(name, weight)
    return made


def _int8(name: str, weight: Tensor) -> list[Case]:
    """Int8 beside the packed product in the type that the processor computes in."""
    outer, inner = weight.shape
    native = library()
    dtype = torch.bfloat16 if native is not None and native.linear_panel else torch.float32
    quantised = quantise_int8(weight)
    int8, packed = Int8Linear(quantised), PackedLinear(weight.to(dtype))
    made = []
    for tokens in (1, 8, 32, 128):
        x = torch.randn(tokens, inner).to(dtype)
        ours, plain = partial(int8, x), partial(packed, x)
        made.append(
            Case(
                f"int8 {name} {inner}x{outer} batch {tokens}",
                ours,
                plain,
                f"packed {str(dtype).removeprefix('torch.')}",
                lambda ours=ours, x=x: torch.equal(ours(), linear_int8_reference(x, quantised)),  # type: ignore[misc]
            )
        )
    return made


if __name__ == "__main__":
    sys.exit(main("linear", cases))
