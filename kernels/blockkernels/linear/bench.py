"""Times packed weights against plain ones: `python -m blockkernels.linear.bench`.

The products of one SmolLM2 layer and of its head, for the batch sizes of decode.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from blockkernels.linear import PackedLinear, linear_reference
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
    return made


if __name__ == "__main__":
    sys.exit(main("linear", cases))
