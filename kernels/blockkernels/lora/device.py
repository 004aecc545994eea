"""Triton code of grouped adapters; launched by `blockkernels.lora.gpu`."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_items"])
def shrink_kernel(
    x, items, part, num_items, x_stride,
    IN: tl.constexpr, ALIGNED: tl.constexpr, MAX_RANK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """part[split, item, m, r] = x[first + m] . A[r] over a part of the inputs, for BLOCK_M tokens at most.

    An item (int64, 8 columns) says: first token, end token, address of A's first row, address of B's first
    row (transposed), rank, first column of y, outputs; the last is unused. Rank 0 is an item without work.
    """
    number, split = tl.program_id(0), tl.program_id(1)
    item = items + number * 8
    rank = tl.load(item + 4)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(2) * BLOCK_R >= rank:
        return
    first, end = tl.load(item), tl.load(item + 1)
    down = tl.load(item + 2).to(x.dtype, bitcast=True)
    if ALIGNED:
        down = tl.multiple_of(down, 16)
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    token = first + m
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in tl.range(split * BLOCK_K, IN, BLOCK_K * SPLIT, num_stages=STAGES):
        at = start + k
        inside = at < IN
        rows = tl.load(
            x + token[:, None] * x_stride + at[None, :],
            mask=(token < end)[:, None] & inside[None, :],
            other=0.0,
        )
        a = tl.load(down + r.to(tl.int64)[None, :] * IN + at[:, None],
                    mask=(r < rank)[None, :] & inside[:, None], other=0.0)  # fmt: skip
        acc = tl.dot(rows, a, acc, input_precision="ieee")
    where = ((split * num_items + number) * BLOCK_M + m).to(tl.int64)[:, None] * MAX_RANK + r[None, :]
    tl.store(part + where, acc, mask=(token < end)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["num_items"], do_not_specialize_on_alignment=["scales"])
def expand_kernel(
    part, items, scales, y, num_items, y_stride,
    ALIGNED: tl.constexpr, MAX_RANK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """y[token, column + o] += scale * part . B[:, o]; a program owns its outputs."""
    number = tl.program_id(0)
    item = items + number * 8
    rank, out = tl.load(item + 4), tl.load(item + 6)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if (rank == 0) | (tl.program_id(1) * BLOCK_N >= out):
        return
    first, end, column = tl.load(item), tl.load(item + 1), tl.load(item + 5)
    up = tl.load(item + 3).to(y.dtype, bitcast=True)
    if ALIGNED:
        up = tl.multiple_of(up, 16)
        out = tl.multiple_of(out, 16)
        column = tl.multiple_of(column, 16)
    m = tl.arange(0, BLOCK_M)
    token = first + m
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        some = (token < end)[:, None] & (r < rank)[None, :]
        inner = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for split in tl.static_range(SPLIT):
            where = ((split * num_items + number) * BLOCK_M + m).to(tl.int64)[:, None] * MAX_RANK + r[None, :]
            inner += tl.load(part + where, mask=some, other=0.0)
        b = tl.load(up + r.to(tl.int64)[:, None] * out + n[None, :],
                    mask=(r < rank)[:, None] & (n < out)[None, :], other=0.0)  # fmt: skip
        acc = tl.dot(inner.to(b.dtype), b, acc, input_precision="ieee")
    live = (token < end)[:, None] & (n < out)[None, :]
    where_y = y + token[:, None] * y_stride + column + n[None, :]
    before = tl.load(where_y, mask=live, other=0.0).to(tl.float32)
    after = before + tl.load(scales + number) * acc
    tl.store(where_y, after.to(y.dtype.element_ty), mask=live)
