"""Triton code of matrix products; launched by `blockkernels.linear.gpu`."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def linear_kernel(
    x, weight, bias, y, part, tokens, x_stride, y_stride,
    IN: tl.constexpr, OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum over k of x[m, k] * weight[n, k] + bias[n].

    A program has BLOCK_M tokens, BLOCK_N outputs and every SPLIT-th block of BLOCK_K inputs; with SPLIT above
    1 it leaves its sums in part[split, m, n] (float32). The weight is the left operand, which has at least
    64 rows.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    k = tl.arange(0, BLOCK_K)
    rows = weight + n.to(tl.int64)[:, None] * IN
    columns = x + m.to(tl.int64)[None, :] * x_stride
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(split * BLOCK_K, IN, BLOCK_K * SPLIT, num_stages=STAGES):
        at = start + k
        if IN % BLOCK_K == 0:
            left = tl.load(rows + at[None, :], mask=(n < OUT)[:, None], other=0.0)
            right = tl.load(columns + at[:, None], mask=(m < tokens)[None, :], other=0.0)
        else:
            left = tl.load(rows + at[None, :], mask=(n < OUT)[:, None] & (at < IN)[None, :], other=0.0)
            right = tl.load(columns + at[:, None], mask=(m < tokens)[None, :] & (at < IN)[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    live = (m < tokens)[None, :] & (n < OUT)[:, None]
    if SPLIT > 1:
        tl.store(part + (split * tokens + m).to(tl.int64)[None, :] * OUT + n[:, None], acc, mask=live)
    else:
        if bias is not None:
            acc += tl.load(bias + n, mask=n < OUT, other=0.0).to(tl.float32)[:, None]
        where = y + m.to(tl.int64)[None, :] * y_stride + n[:, None]
        tl.store(where, acc.to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["tokens"])
def sum_parts_kernel(
    part, bias, y, tokens, y_stride, OUT: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):
    """y[m, n] = part[0, m, n] + part[1, m, n] + ... + bias[n], always in this order."""
    m = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT):
        acc += tl.load(part + tl.cast(split * tokens + m, tl.int64) * OUT + n, mask=n < OUT, other=0.0)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < OUT, other=0.0).to(tl.float32)
    tl.store(y + m.to(tl.int64) * y_stride + n, acc.to(y.dtype.element_ty), mask=n < OUT)


@triton.jit
def _turned(values, BLOCKS: tl.constexpr):
    """The products of blocks of 64 values with the Hadamard matrix, in the order of Sylvester."""
    for stage in tl.static_range(6):
        pairs = tl.reshape(values, (BLOCKS, 32 >> stage, 2, 1 << stage))
        first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        pairs = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
        values = tl.reshape(pairs, (BLOCKS, 64))
    return values


@triton.jit
def round_rows_kernel(
    x, rounded, steps, x_stride, IN: tl.constexpr, BLOCKS: tl.constexpr, TINY: tl.constexpr
):
    """Rows rotated within blocks of 64 inputs and rounded to int8; a program has one row, BLOCKS at a time.

    Shape: x [tokens, IN], rounded int8 [tokens, IN], steps float32 [tokens].
    """
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, BLOCKS)[:, None] * 64 + tl.arange(0, 64)[None, :]
    largest = 0.0
    poison = 0.0
    for start in tl.range(0, IN, BLOCKS * 64):
        at = start + within
        values = _turned(tl.load(x + row * x_stride + at, mask=at < IN, other=0.0).to(tl.float32), BLOCKS)
        size = tl.where(values == values, tl.abs(values), 0.0)
        largest = tl.maximum(largest, tl.max(tl.max(size, 1), 0))
        poison += tl.sum(tl.sum(values * 0.0, 1), 0)
    inverse = tl.where(largest > TINY, tl.div_rn(127.0, tl.maximum(largest, TINY)), 0.0)
    magic = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, ties to even
    for start in tl.range(0, IN, BLOCKS * 64):
        at = start + within
        values = _turned(tl.load(x + row * x_stride + at, mask=at < IN, other=0.0).to(tl.float32), BLOCKS)
        whole = (values * inverse + magic) - magic
        whole = tl.minimum(tl.maximum(tl.where(whole == whole, whole, 0.0), -127.0), 127.0)
        tl.store(rounded + row * IN + at, whole.to(tl.int8), mask=at < IN)
    tl.store(steps + row, (tl.div_rn(largest, 127.0) + poison) * 0.125)


@triton.jit(do_not_specialize=["tokens"])
def int8_kernel(
    rounded, steps, weight, scales, bias, y, tokens, y_stride,
    IN: tl.constexpr, OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y[m, n] = steps[m] * scales[n] * (sum over k of rounded[m, k] * weight[n, k]) + bias[n]; exact sums."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = weight + n.to(tl.int64)[:, None] * IN
    columns = rounded + m.to(tl.int64)[None, :] * IN
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for start in tl.range(0, IN, BLOCK_K, num_stages=STAGES):
        at = start + k
        left = tl.load(rows + at[None, :], mask=(n < OUT)[:, None] & (at < IN)[None, :], other=0)
        right = tl.load(columns + at[:, None], mask=(m < tokens)[None, :] & (at < IN)[:, None], other=0)
        acc = tl.dot(left, right, acc, out_dtype=tl.int32)
    step = tl.load(steps + m, mask=m < tokens, other=0.0)
    scale = tl.load(scales + n, mask=n < OUT, other=0.0)
    out = acc.to(tl.float32) * (step[None, :] * scale[:, None])
    if bias is not None:
        out += tl.load(bias + n, mask=n < OUT, other=0.0).to(tl.float32)[:, None]
    where = y + m.to(tl.int64)[None, :] * y_stride + n[:, None]
    tl.store(where, out.to(y.dtype.element_ty), mask=(m < tokens)[None, :] & (n < OUT)[:, None])
