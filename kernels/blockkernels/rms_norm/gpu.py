"""Norms by Triton, together with the sums that come before them in a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from blockkernels.launching import launch, power_of_two
from blockkernels.rms_norm.device import add_norm_kernel


def add_norm(
    hidden: Tensor,
    added: Tensor | None,
    *,
    post: Tensor | None = None,
    scale: float = 1.0,
    following: Tensor | None = None,
    eps: float,
) -> Tensor:
    """hidden += scale * norm(added), in place, then the norm of it; in one launch.

    Args:
        hidden: [tokens, hidden], contiguous.
        added: [tokens, hidden]; None to add nothing.
        post: weight of a norm on `added`; None for no norm. See `rms_norm_reference` for its types.
        scale: of what is added.
        following: weight of a norm on the sum; None for no norm.
        eps: of both norms.

    Returns:
        The norm of hidden; hidden itself without `following`.
    """
    tokens, size = hidden.shape
    assert hidden.is_contiguous()
    result = hidden if following is None else torch.empty_like(hidden)
    block = power_of_two(size)
    launch(
        add_norm_kernel, (tokens,), hidden, added, post, following, result, eps, scale,
        0 if added is None else added.stride(0), warps=min(16, max(1, block // 512)), SIZE=size, BLOCK=block,
    )  # fmt: skip
    return result
