"""Times decode attention: `python -m blockkernels.attention.bench`.

One query over its own keys, as decode does for each request and layer, against
torch's own handling of grouped heads.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from blockkernels.attention import attend, attend_reference
from blockkernels.timing import Case, close, main


def grouped(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The baseline: `enable_gqa` on the same views."""
    out = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def cases() -> list[Case]:
    """SmolLM2's heads at several context lengths, bf16."""
    torch.manual_seed(0)
    made = []
    for length in (32, 160, 512, 2048):
        query = torch.randn(1, 9, 64).bfloat16()
        keys, values = torch.randn(2, length, 3, 64).bfloat16()
        ours = partial(attend, query, keys, values, scale=0.125)
        want = attend_reference(query, keys, values, scale=0.125)
        made.append(
            Case(
                f"decode, context {length}",
                ours,
                partial(grouped, query, keys, values, 0.125),
                "enable_gqa",
                lambda ours=ours, want=want: close(ours(), want, 2e-2),  # type: ignore[misc]
            )
        )
    return made


if __name__ == "__main__":
    sys.exit(main("attention", cases))
