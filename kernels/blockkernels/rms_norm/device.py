"""Triton code of norms; launched by `blockkernels.rms_norm.gpu`."""

import triton
import triton.language as tl


@triton.jit
def normed(values, weight, size, eps, TYPE: tl.constexpr):
    """Values of one norm, float32 with zeros behind the last, times a loaded weight; rounded to TYPE.

    A weight of TYPE multiplies what was rounded before, a float32 weight what was not.
    """
    values = values * tl.rsqrt(tl.sum(values * values) / size + eps)
    if weight.dtype != tl.float32:
        values = values.to(TYPE).to(tl.float32)
    return (values * weight.to(tl.float32)).to(TYPE)


@triton.jit
def add_norm_kernel(
    hidden, added, post, following, normed_out, eps, scale, added_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """hidden += scale * norm(added), then normed_out = norm(hidden); a program has one row.

    Without `added` hidden stays; without `post` or `following` there is no such norm.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    live = at < SIZE
    TYPE: tl.constexpr = hidden.dtype.element_ty
    values = tl.load(hidden + row * SIZE + at, mask=live, other=0.0)
    if added is not None:
        more = tl.load(added + row * added_stride + at, mask=live, other=0.0)
        if post is not None:
            more = normed(more.to(tl.float32), tl.load(post + at, mask=live, other=0.0), SIZE, eps, TYPE)
        more = (more.to(tl.float32) * scale).to(TYPE)
        values = (values.to(tl.float32) + more.to(tl.float32)).to(TYPE)
        tl.store(hidden + row * SIZE + at, values, mask=live)
    if following is not None:
        weight = tl.load(following + at, mask=live, other=0.0)
        tl.store(
            normed_out + row * SIZE + at, normed(values.to(tl.float32), weight, SIZE, eps, TYPE), mask=live
        )
