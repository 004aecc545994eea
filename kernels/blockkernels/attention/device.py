"""Triton code of attention over pages; launched by `blockkernels.attention.gpu`."""

import triton
import triton.language as tl

from blockkernels.soft_cap.device import capped


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["table"])
def attend_kernel(
    query, keys, values, table, items, part, part_sums, y, scale, softcap, table_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, DIRECT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program has some queries of one request, all heads that share a key head, and a stretch of keys.

    Row m of its tile is query m // GROUP, head m % GROUP. An item (int32, 8 columns) says: the request, its
    first row in the batch, queries, position of the first, first key, end key, first row of the parts; the
    last is unused. A part has, for each head, the softmax of its stretch times the values (float32), and the
    highest score with the sum below it (both to base 2). DIRECT items have all keys of their queries: the
    result goes to y, and there is no part.
    """
    item = items + tl.program_id(0) * 8
    head = tl.program_id(1)
    request, row, count = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    position, first, end, place = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    if count == 0:
        return
    m, d, n = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH), tl.arange(0, BLOCK_N)
    number, member = m // GROUP, m % GROUP
    mine = number < count
    at_query = ((row + number) * KV_HEADS + head) * GROUP + member
    real = d < DIM
    x = tl.load(
        query + at_query.to(tl.int64)[:, None] * DIM + d[None, :],
        mask=mine[:, None] & real[None, :],
        other=0.0,
    )
    stands = position + number
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    pages = table + request.to(tl.int64) * table_stride
    for start in tl.range(first, end, BLOCK_N, num_stages=STAGES):
        at = start + n
        live = at < end
        slot = tl.load(pages + at // PAGE, mask=live, other=0).to(tl.int64) * PAGE + at % PAGE
        where = (slot * KV_HEADS + head)[:, None] * DIM + d[None, :]
        inside = live[:, None] & real[None, :]
        key = tl.load(keys + where, mask=inside, other=0.0)
        score = tl.dot(x, tl.trans(key), input_precision="ieee") * scale
        if CAPPED:
            score = capped(score, softcap)
        seen = live[None, :] & (at[None, :] <= stands[:, None])
        if WINDOW > 0:
            seen = seen & (at[None, :] > stands[:, None] - WINDOW)
        score = tl.where(seen, score * 1.4426950408889634, float("-inf"))
        peak = tl.maximum(top, tl.max(score, 1))
        ground = tl.where(peak == float("-inf"), 0.0, peak)  # nothing seen yet: -inf less -inf is NaN
        weight = tl.exp2(score - ground[:, None])
        keep = tl.exp2(top - ground)
        total = total * keep + tl.sum(weight, 1)
        value = tl.load(values + where, mask=inside, other=0.0)
        acc = tl.dot(weight.to(value.dtype), value, acc * keep[:, None], input_precision="ieee")
        top = peak
    if DIRECT:
        tl.store(
            y + at_query.to(tl.int64)[:, None] * DIM + d[None, :],
            (acc / tl.where(total == 0.0, 1.0, total)[:, None]).to(y.dtype.element_ty),
            mask=mine[:, None] & real[None, :],
        )
        return
    out = ((place + number) * KV_HEADS + head) * GROUP + member
    tl.store(
        part + out.to(tl.int64)[:, None] * DIM + d[None, :],
        acc / tl.where(total == 0.0, 1.0, total)[:, None],
        mask=mine[:, None] & real[None, :],
    )
    tl.store(part_sums + out * 2, top, mask=mine)
    tl.store(part_sums + out * 2 + 1, total, mask=mine)


@triton.jit
def combine_kernel(
    part, part_sums, rows, y, HEADS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """y of one token and BLOCK heads from its parts, in their order.

    rows (int32 [tokens + 1]) has the first part of each token, and behind the last the number of parts.
    """
    token = tl.program_id(0)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, WIDTH)
    if tl.load(rows + token) == tl.load(rows + token + 1):
        return  # of a prompt, whose result is there
    real = head < HEADS
    live = real[:, None] & (d < DIM)[None, :]
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, WIDTH), tl.float32)
    for place in tl.range(tl.load(rows + token), tl.load(rows + token + 1)):
        at = place * HEADS + head
        peak = tl.load(part_sums + at * 2, mask=real, other=0.0)
        share = tl.load(part_sums + at * 2 + 1, mask=real, other=1.0)
        values = tl.load(part + at.to(tl.int64)[:, None] * DIM + d[None, :], mask=live, other=0.0)
        higher = tl.maximum(top, peak)
        ground = tl.where(higher == float("-inf"), 0.0, higher)
        old, new = total * tl.exp2(top - ground), share * tl.exp2(peak - ground)
        total = old + new
        acc = (acc * old[:, None] + values * new[:, None]) / tl.where(total == 0.0, 1.0, total)[:, None]
        top = higher
    where = y + (token.to(tl.int64) * HEADS + head)[:, None] * DIM + d[None, :]
    tl.store(where, acc.to(y.dtype.element_ty), mask=live)
