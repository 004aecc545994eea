"""Triton code that places queries, keys and values; launched by `blockkernels.rotary.gpu`."""

import triton
import triton.language as tl


@triton.jit
def _placed(
    x, norm, cosine, sine, eps,
    NUM: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, NEIGHBOURS: tl.constexpr,
    BY_HEAD: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Heads of one token [HEADS, WIDTH], normalised and rotated."""
    head, d = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    TYPE: tl.constexpr = x.dtype.element_ty
    live = (head < NUM) & (d < DIM)
    if NEIGHBOURS:
        other, angle, first = d ^ 1, d // 2, d % 2 == 0
    else:
        other, angle, first = tl.where(d < HALF, d + HALF, d - HALF), d % max(HALF, 1), d < HALF
    turned = live & (d < 2 * HALF)
    values = tl.load(x + head * DIM + d, mask=live, other=0.0)
    if norm is not None:
        # Both members of a pair are normalised: a lane needs its own value and its partner's.
        partners = tl.load(x + head * DIM + other, mask=turned, other=0.0).to(tl.float32)
        wide = values.to(tl.float32)
        if BY_HEAD:
            root = tl.rsqrt(tl.sum(wide * wide, 1) / DIM + eps)[:, None]
            at = d
            at_other = other
        else:
            root = tl.rsqrt(tl.sum(tl.sum(wide * wide, 1), 0) / (NUM * DIM) + eps)
            at = head * DIM + d
            at_other = head * DIM + other
        weight = tl.load(norm + at, mask=live, other=0.0)
        weight_other = tl.load(norm + at_other, mask=turned, other=0.0)
        wide = wide * root
        partners = partners * root
        if weight.dtype != tl.float32:
            wide = wide.to(TYPE).to(tl.float32)
            partners = partners.to(TYPE).to(tl.float32)
        values = (wide * weight.to(tl.float32)).to(TYPE)
        partner = (partners * weight_other.to(tl.float32)).to(TYPE).to(tl.float32)
    else:
        partner = tl.load(x + head * DIM + other, mask=turned, other=0.0).to(tl.float32)
    if HALF > 0:
        cos = tl.load(cosine + angle, mask=d < 2 * HALF, other=0.0)
        sin = tl.load(sine + angle, mask=d < 2 * HALF, other=0.0)
        straight = values.to(tl.float32) * cos.to(tl.float32)
        crossed = partner * sin.to(tl.float32)
        if cos.dtype != tl.float32:
            straight = straight.to(TYPE).to(tl.float32)
            crossed = crossed.to(TYPE).to(tl.float32)
        rotated = tl.where(first, straight - crossed, straight + crossed)
        values = tl.where(d < 2 * HALF, rotated.to(TYPE), values)
    return values


@triton.jit(do_not_specialize_on_alignment=["slots", "cosine", "sine"])
def place_kernel(
    qkv, query_norm, key_norm, cosine, sine, slots, query, keys, values, eps, qkv_stride,
    NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    NEIGHBOURS: tl.constexpr, BY_HEAD: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """A program has one token, and its queries (0), keys (1) or values (2).

    Queries go to query[token], keys and values to the slot of the token in the pages.
    """
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = qkv + token * qkv_stride
    at = token * HALF
    d = tl.arange(0, WIDTH)[None, :]
    if part == 0:
        head = tl.arange(0, HEADS)[:, None]
        queries = _placed(
            row,
            query_norm,
            cosine + at,
            sine + at,
            eps,
            NUM_HEADS,
            DIM,
            HALF,
            NEIGHBOURS,
            BY_HEAD,
            HEADS,
            WIDTH,
        )
        where = query + token * NUM_HEADS * DIM + head * DIM + d
        tl.store(where, queries, mask=(head < NUM_HEADS) & (d < DIM))
    else:
        kv_head = tl.arange(0, KV_HEADS)[:, None]
        live = (kv_head < NUM_KV) & (d < DIM)
        slot = tl.load(slots + token) * NUM_KV * DIM + kv_head * DIM + d
        if part == 1:
            placed = _placed(
                row + NUM_HEADS * DIM,
                key_norm,
                cosine + at,
                sine + at,
                eps,
                NUM_KV,
                DIM,
                HALF,
                NEIGHBOURS,
                BY_HEAD,
                KV_HEADS,
                WIDTH,
            )
            tl.store(keys + slot, placed, mask=live)
        else:
            first = (NUM_HEADS + NUM_KV) * DIM
            tl.store(values + slot, tl.load(row + first + kv_head * DIM + d, mask=live), mask=live)
