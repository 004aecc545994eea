"""Drawing one token per row, spelled out in plain Python: the truth the fast sampler is tested against.

Semantics, per row with logits ``l``::

    temperature == 0:  argmax(l), the lowest id among equals
    otherwise:         p = softmax(l / temperature)
                       top_k:  keep tokens as likely as the k-th most likely or more
                       top_p:  renormalise; walk from the most likely (lower id first among equals) and
                               keep a token while the mass before it is below top_p
                       min_p:  keep tokens at least min_p times as likely as the most likely
                       draw:   the first id whose running sum of kept mass, in id order, exceeds u * total

This is the order of transformers' logits warpers. The noise ``u`` depends on
(seed, choice, position) only, so a request gives the same tokens alone, in any
batch and when it is resumed elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Counter = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How to draw each row of a batch; every field has one entry per row.

    Attributes:
        temperature: 0 is greedy; values between 0 and 1e-30 act as 1e-30.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with this mass, in (0, 1].
        min_p: keep tokens at least this share as likely as the most likely, in [0, 1].
        seed: unsigned 64 bits.
        choice: which of several answers to one prompt, unsigned 32 bits.
        position: index of the token that is drawn, unsigned 64 bits.

    Raises:
        ValueError: the fields differ in length.
    """

    temperature: Sequence[float]
    top_k: Sequence[int]
    top_p: Sequence[float]
    min_p: Sequence[float]
    seed: Sequence[int]
    choice: Sequence[int]
    position: Sequence[int]

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in self.__slots__}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"fields of a sampling batch differ in length: {lengths}")

    @property
    def num_rows(self) -> int:
        """Rows of logits this batch is for."""
        return len(self.temperature)


def philox4x32(counter: Counter, key: tuple[int, int]) -> Counter:
    """Philox4x32-10: 128 random bits for a 128-bit counter and a 64-bit key.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (high >> 32) ^ c1 ^ k0, high & _MASK32, (low >> 32) ^ c3 ^ k1, low & _MASK32
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK32, (k1 + _KEY_STEPS[1]) & _MASK32
    return c0, c1, c2, c3


def uniform(seed: int, choice: int, position: int) -> float:
    """The noise of one draw: a multiple of 2**-53 in [0, 1), fixed by (seed, choice, position)."""
    first, second, _, _ = philox4x32(
        (position & _MASK32, (position >> 32) & _MASK32, choice & _MASK32, 0),
        (seed & _MASK32, (seed >> 32) & _MASK32),
    )
    return ((first << 21) | (second >> 11)) / (1 << 53)


def probabilities(
    row: Sequence[float], *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[float]:
    """Probability of each token of one row after temperature and filters, in float64.

    Args:
        row: logits of the vocabulary; ``-inf`` marks a token that cannot be drawn.
        temperature: above 0.
        top_k: see `SamplingBatch`, as are the others.
        top_p: mass to keep.
        min_p: share of the most likely token to keep.
    """
    best = max(row)
    scaled = [(value - best) / max(temperature, 1e-30) for value in row]
    order = sorted(range(len(row)), key=lambda token: (-scaled[token], token))
    kept = order
    if 0 < top_k < len(row):
        kept = [token for token in order if scaled[token] >= scaled[order[top_k - 1]]]
    weight = {token: math.exp(scaled[token]) for token in kept}
    if top_p < 1.0:
        nucleus: list[int] = []
        budget, before = top_p * math.fsum(weight.values()), 0.0
        for token in kept:
            if nucleus and before >= budget:
                break
            nucleus.append(token)
            before += weight[token]
        kept = nucleus
    kept = [token for token in kept if weight[token] >= min_p]
    total = math.fsum(weight[token] for token in kept)
    result = [0.0] * len(row)
    for token in kept:
        result[token] = weight[token] / total
    return result


def draw(probability: Sequence[float], noise: float) -> int:
    """The first id whose running sum of probability exceeds ``noise``."""
    running, last = 0.0, 0
    for token, share in enumerate(probability):
        if share > 0.0:
            running, last = running + share, token
            if running > noise:
                break
    return last


def sample_reference(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Draw one token per row, one row after the other.

    Args:
        logits: [rows, vocab] float32, without NaN.
        batch: how to draw each row.

    Returns:
        [rows] int64 token ids on the CPU.
    """
    tokens = []
    for index, values in enumerate(logits.tolist()):
        if batch.temperature[index] == 0.0:
            tokens.append(max(range(len(values)), key=values.__getitem__))
            continue
        probability = probabilities(
            values,
            temperature=batch.temperature[index],
            top_k=batch.top_k[index],
            top_p=batch.top_p[index],
            min_p=batch.min_p[index],
        )
        noise = uniform(batch.seed[index], batch.choice[index], batch.position[index])
        tokens.append(draw(probability, noise))
    return torch.tensor(tokens, dtype=torch.int64)


def logprobs_reference(row: Sequence[float]) -> list[float]:
    """Natural log-probability of each token under unmodified logits, in float64."""
    best = max(row)
    log_total = math.log(math.fsum(math.exp(value - best) for value in row))
    return [value - best - log_total for value in row]
