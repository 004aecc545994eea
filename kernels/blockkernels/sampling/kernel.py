"""Drawing one token per row of a mixed batch, vectorised; the semantics are in `reference`.

Masses are summed as integers: a token's weight is ``round(exp(scaled logit) * 2**42)``. Integer
sums are exact in any order, so a row's token does not depend on the rows beside it, on the number
of threads or on how a device splits a scan. Tokens less than 2**-43 as likely as the best are never drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blockkernels.native import NativeLibrary, library, threads_for
from blockkernels.sampling.reference import SamplingBatch

ONE = 1 << 42
"""Weight of the most likely token of a row."""
MAX_VOCAB = 1 << 20
"""Largest vocabulary whose weights cannot overflow 63 bits."""
SORT_BOUNDS = (256, 2048)
"""Candidates that are looked at, one bound after the other, before a row is sorted whole."""
MOST_NATIVE = 64
"""Alternatives that the C kernel keeps in order; more are sorted."""
MIN_TEMPERATURE = 1e-30
"""Keeps 0 / temperature finite in float32."""

_MASK32 = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities under unmodified logits.

    Attributes:
        chosen: [rows] float64, of the given tokens.
        top_ids: [rows, top_n] int64, most likely first, lower id first among equals.
        top: [rows, top_n] float64, theirs.
    """

    chosen: Tensor
    top_ids: Tensor
    top: Tensor


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Draw one token per row.

    Rows without filters are not sorted; rows with top-k or top-p look at their best
    tokens (`SORT_BOUNDS`) and are sorted whole only when those do not hold the mass.

    Args:
        logits: [rows, vocab] float32; not modified. A row with NaN gives an arbitrary valid
            id and disturbs no other row: find such rows with `nonfinite_rows`.
        batch: how to draw each row.

    Returns:
        [rows] int64 token ids on the device of the logits.

    Raises:
        ValueError: shapes or dtype do not fit, or the vocabulary exceeds `MAX_VOCAB`.
    """
    _check(logits)
    if batch.num_rows != logits.shape[0]:
        raise ValueError(f"{logits.shape[0]} rows of logits, but a batch of {batch.num_rows}")
    drawn = [row for row in range(batch.num_rows) if batch.temperature[row] != 0.0]
    if not drawn:
        return logits.argmax(dim=-1)
    if len(drawn) == batch.num_rows:
        return _draw(token_weights(logits, batch), _noise(batch, drawn, logits.device))
    tokens = logits.argmax(dim=-1)
    index = torch.tensor(drawn, device=logits.device)
    weight = token_weights(logits.index_select(0, index), _rows(batch, drawn))
    tokens[index] = _draw(weight, _noise(batch, drawn, logits.device))
    return tokens


def token_weights(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Weight of every token after temperature and filters.

    Args:
        logits: [rows, vocab] float32.
        batch: how to draw each row; every temperature above 0.

    Returns:
        [rows, vocab] int64, proportional to the probabilities; the best token has `ONE`.
    """
    _check(logits)
    device, vocab = logits.device, logits.shape[1]
    temperature = torch.tensor(batch.temperature, device=device, dtype=torch.float32)
    scaled = logits - logits.amax(dim=-1, keepdim=True)
    scaled /= temperature.clamp_(min=MIN_TEMPERATURE)[:, None]
    weight = (scaled.exp() * ONE).round_().to(torch.int64)
    ranked = [r for r in range(batch.num_rows) if 0 < batch.top_k[r] < vocab or batch.top_p[r] < 1.0]
    if len(ranked) == batch.num_rows:
        weight = _keep_best(scaled, weight, batch)
    elif ranked:
        index = torch.tensor(ranked, device=device)
        weight[index] = _keep_best(scaled[index], weight[index], _rows(batch, ranked))
    if any(batch.min_p):
        floor = torch.tensor([math.ceil(share * ONE) for share in batch.min_p], device=device)
        weight.masked_fill_(weight < floor[:, None], 0)
    return weight


def _keep_best(scaled: Tensor, weight: Tensor, batch: SamplingBatch) -> Tensor:
    """Weights after top-k and top-p; looks at few candidates first, at more for the rows left over."""
    vocab = scaled.shape[1]
    wanted = [min(k, vocab) if k > 0 else vocab for k in batch.top_k]
    bounds = [bound for bound in SORT_BOUNDS if bound < vocab] + [vocab]
    if max(wanted) <= bounds[0]:
        bounds[0] = max(wanted)
    kept = weight
    rows = list(range(batch.num_rows))
    for bound in bounds:
        if len(rows) == batch.num_rows:
            kept, enough = _keep_among(scaled, weight, batch, wanted, bound)
        else:
            index = torch.tensor(rows, device=scaled.device)
            part, enough = _keep_among(
                scaled[index], weight[index], _rows(batch, rows), [wanted[r] for r in rows], bound
            )
            kept[index] = part
        rows = [row for row, settled in zip(rows, enough, strict=True) if not settled]
        if not rows:
            break
    return kept


def _keep_among(
    scaled: Tensor, weight: Tensor, batch: SamplingBatch, wanted: Sequence[int], bound: int
) -> tuple[Tensor, list[bool]]:
    """Filter by looking at the best ``bound`` tokens of each row.

    Only their values and weights are used, never the order of equal values, which is unspecified.

    Returns:
        The filtered weights [rows, vocab] and, per row, whether ``bound`` tokens were enough.
    """
    device, vocab = scaled.device, scaled.shape[1]
    best, ids = scaled.topk(bound, dim=-1) if bound < vocab else scaled.sort(dim=-1, descending=True)
    kth = torch.tensor([min(k, bound) - 1 for k in wanted], device=device)[:, None]
    threshold = best.gather(1, kth)
    threshold.masked_fill_(torch.tensor([k >= vocab for k in wanted], device=device)[:, None], -math.inf)
    # Tokens equal to the k-th all stay, as in transformers.
    kept = weight if min(wanted) >= vocab else torch.where(scaled >= threshold, weight, 0)
    enough = [bound == vocab or k <= bound for k in wanted]
    if min(batch.top_p) >= 1.0:
        return kept, enough
    running = torch.where(best >= threshold, weight.gather(1, ids), 0).cumsum(1)  # [rows, bound]
    top_p = torch.tensor(batch.top_p, device=device, dtype=torch.float64)[:, None]
    budget = kept.sum(1, keepdim=True).to(torch.float64) * top_p
    before = torch.cat([torch.zeros_like(running[:, :1]), running[:, :-1]], dim=1)
    count = (before < budget).sum(1, keepdim=True).clamp_(min=1)  # size of the nucleus, if it ends here
    edge = best.gather(1, count - 1)
    nucleus = scaled >= edge
    spare = count - (best > edge).sum(1, keepdim=True)  # how many of the tokens equal to the edge are in
    equal = scaled == edge
    if not torch.equal(equal.sum(1, keepdim=True), spare):
        nucleus &= ~equal | (equal.cumsum(1) <= spare)
    kept = torch.where(nucleus | (top_p >= 1.0), kept, 0)
    reached = (running[:, -1:] >= budget)[:, 0].tolist()
    for row, share in enumerate(batch.top_p):
        if share < 1.0:
            # A threshold below the bound is not known, so such a row's budget is not either.
            enough[row] = bound == vocab or (reached[row] and (wanted[row] <= bound or wanted[row] >= vocab))
    return kept, enough


def _draw(weight: Tensor, noise: Tensor) -> Tensor:
    """First id whose running weight exceeds noise * total; weight [rows, vocab], noise [rows] float64."""
    running = weight.cumsum(1)
    total = running[:, -1:]
    target = torch.minimum((noise[:, None] * total).to(torch.int64), total - 1)
    return torch.searchsorted(running, target, right=True)[:, 0].clamp_(max=weight.shape[1] - 1)


def uniforms(seed: Sequence[int], choice: Sequence[int], position: Sequence[int]) -> NDArray[np.float64]:
    """`reference.uniform` of many draws at once: [rows] float64 in [0, 1)."""
    key, step = np.array(seed, dtype=np.uint64), np.array(position, dtype=np.uint64)
    k0, k1 = key & _MASK32, key >> _HALF
    c0, c1 = step & _MASK32, step >> _HALF
    c2, c3 = np.array(choice, dtype=np.uint64) & _MASK32, np.zeros_like(step)
    for _ in range(10):
        low, high = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (high >> _HALF) ^ c1 ^ k0, high & _MASK32, (low >> _HALF) ^ c3 ^ k1, low & _MASK32
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _MASK32, (k1 + np.uint64(0xBB67AE85)) & _MASK32
    bits = (c0 << np.uint64(21)) | (c1 >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53


def _noise(batch: SamplingBatch, rows: Sequence[int], device: torch.device) -> Tensor:
    pick = _rows(batch, rows)
    return torch.from_numpy(uniforms(pick.seed, pick.choice, pick.position)).to(device)


def _rows(batch: SamplingBatch, rows: Sequence[int]) -> SamplingBatch:
    """The part of a batch that belongs to some of its rows."""
    return SamplingBatch(
        temperature=[batch.temperature[r] for r in rows],
        top_k=[batch.top_k[r] for r in rows],
        top_p=[batch.top_p[r] for r in rows],
        min_p=[batch.min_p[r] for r in rows],
        seed=[batch.seed[r] for r in rows],
        choice=[batch.choice[r] for r in rows],
        position=[batch.position[r] for r in rows],
    )


def logprobs(logits: Tensor, token_ids: Tensor, top_n: int) -> TokenLogprobs:
    """Log-probabilities of given tokens and of the ``top_n`` most likely ones, per row.

    Args:
        logits: [rows, vocab] float32, before temperature and filters.
        token_ids: [rows] int64.
        top_n: alternatives per row, 0 for none.

    Raises:
        ValueError: shapes or dtype do not fit, or ``top_n`` is not in [0, vocab].
    """
    _check(logits)
    rows, vocab = logits.shape
    if token_ids.shape != (rows,):
        raise ValueError(f"token ids of shape {tuple(token_ids.shape)} for {rows} rows")
    if not 0 <= top_n <= vocab:
        raise ValueError(f"top_n is {top_n}, the vocabulary {vocab}")
    native = library() if logits.device.type == "cpu" and top_n <= MOST_NATIVE else None
    if native is not None and logits.stride(1) == 1 and token_ids.numel():
        return _native_logprobs(native, logits, token_ids, top_n)
    shifted = logits.to(torch.float64)
    shifted -= shifted.amax(dim=-1, keepdim=True)
    # Summed as integers for the reason in the module docstring; the result is good to 1e-7.
    total = (shifted.exp() * ONE).round_().to(torch.int64).sum(1, keepdim=True)
    shifted -= (total.to(torch.float64) / ONE).log_()
    chosen = shifted.gather(1, token_ids[:, None])[:, 0]
    top_ids = _top_ids(logits, top_n)
    return TokenLogprobs(chosen=chosen, top_ids=top_ids, top=shifted.gather(1, top_ids))


def _native_logprobs(native: NativeLibrary, logits: Tensor, token_ids: Tensor, top_n: int) -> TokenLogprobs:
    """The same by the C kernel, which goes over a row twice."""
    rows, vocab = logits.shape
    token_ids = token_ids.contiguous()
    if int(token_ids.min()) < 0 or int(token_ids.max()) >= vocab:
        raise ValueError(f"token ids outside a vocabulary of {vocab}")
    found = TokenLogprobs(
        chosen=torch.empty(rows, dtype=torch.float64),
        top_ids=torch.empty(rows, top_n, dtype=torch.int64),
        top=torch.empty(rows, top_n, dtype=torch.float64),
    )
    scratch = torch.empty(rows, top_n)
    places = (logits, token_ids, found.chosen, found.top_ids, found.top, scratch)
    threads = min(rows, threads_for(logits.numel()))
    native.logprobs(*(place.data_ptr() for place in places), rows, vocab, logits.stride(0), top_n, threads)
    return found


def _top_ids(logits: Tensor, top_n: int) -> Tensor:
    """Ids of the ``top_n`` largest values per row, lower id first among equals: [rows, top_n]."""
    rows = logits.shape[0]
    if not top_n:
        return torch.empty((rows, 0), dtype=torch.int64, device=logits.device)
    edge = logits.topk(top_n, dim=-1).values[:, -1:]
    above, equal = logits > edge, logits == edge
    spare = top_n - above.sum(1, keepdim=True)
    ids = (above | (equal & (equal.cumsum(1) <= spare))).nonzero()[:, 1].view(rows, top_n)
    order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(1, order)


def nonfinite_rows(logits: Tensor) -> list[int]:
    """Rows that cannot be drawn from: they hold NaN or +inf, or nothing but -inf.

    Args:
        logits: [rows, vocab].
    """
    return (~logits.amax(dim=-1).isfinite()).nonzero()[:, 0].tolist()


def _check(logits: Tensor) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise ValueError(f"logits must be [rows, vocab] float32, not {tuple(logits.shape)} {logits.dtype}")
    if not 0 < logits.shape[1] <= MAX_VOCAB:
        raise ValueError(f"a vocabulary of {logits.shape[1]} tokens; 1 to {MAX_VOCAB} are supported")
