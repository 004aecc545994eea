"""The numbers of an equivalence record: divergence, agreement, distance of weights. Needs torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from blockzoo.compute.stored import is_quantised, read_weight, weight_names
from blockzoo.errors import EvaluationError
from blockzoo.evaluation.forward import LinkLoader, LoadedLink, Windows
from blockzoo.manifest import Link
from blockzoo.zoo import Zoo

BATCH_TOKENS = 2048
"""Tokens computed together; bounds the memory of hidden states."""

LOGIT_ROWS = 128
"""Rows of logits compared together: 100 MB in float64 for a vocabulary of 100 000."""


_NONE = -1
"""In the place of a token that follows, where there is none."""

PART_ELEMENTS = 1 << 22
"""Elements of a weight that are compared together, so that the largest needs no float64 copy of its own."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """How two chains' outputs differ; see `EquivalenceRecord` for the first four fields.

    Attributes:
        perplexities: of the text for the original and for the substituted chain; the first token of each
            window is given.
    """

    mean_kl: float
    worst_kl: float
    top1_agreement: float
    num_tokens: int
    perplexities: tuple[float, float]


@torch.inference_mode()
def measure(
    loader: LinkLoader,
    original: Sequence[LoadedLink],
    substituted: Sequence[LoadedLink],
    first: int,
    windows: Sequence[Sequence[int]],
    on_tokens: Callable[[int], None],
) -> Divergence:
    """Run both chains over the windows and compare their outputs at every position.

    Semantics: KL(P || Q) = sum over v of P(v) (log P(v) - log Q(v)), P the softmax of the original's logits
    and Q that of the substituted chain's, in float64.

    Args:
        loader: what the links were loaded with.
        original: a chain.
        substituted: the same chain with other links in the place of some of its own.
        first: position of the first of them; what comes before is computed once.
        windows: token ids.
        on_tokens: called with the tokens just compared.

    Raises:
        EvaluationError: a chain computes NaN or infinity.
    """
    divergences: list[Tensor] = []
    agreed = num_predicted = 0
    losses = [0.0, 0.0]
    first = min(first, len(original) - 1)
    for batch in _batches(windows):
        context = Windows(batch, loader)
        shared = context.run(original[:first], context.token_ids)
        ours = context.run(original[first:-1], shared)
        theirs = context.run(substituted[first:-1], shared)
        following = _following(context).split(LOGIT_ROWS)
        for mine, other, next_ids in zip(
            ours.split(LOGIT_ROWS), theirs.split(LOGIT_ROWS), following, strict=True
        ):
            p = _finite(context.logits(original[-1], mine), "original")
            q = _finite(context.logits(substituted[-1], other), "substituted")
            divergences.append(kl_divergence(p, q))
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            num_predicted += int((next_ids != _NONE).sum())
            for side, logits in enumerate((p, q)):
                losses[side] += _loss(logits, next_ids)
            on_tokens(len(mine))
    kl = torch.cat(divergences)
    original_perplexity, perplexity = (math.exp(loss / max(num_predicted, 1)) for loss in losses)
    return Divergence(
        float(kl.mean()), float(kl.max()), agreed / len(kl), len(kl), (original_perplexity, perplexity)
    )


def _following(context: Windows) -> Tensor:
    """The token after each one in its window, `_NONE` after the last."""
    ids = context.token_ids.view(-1, context.length).roll(-1, 1)
    ids[:, -1] = _NONE
    return ids.flatten()


def _loss(logits: Tensor, next_ids: Tensor) -> float:
    """Sum of the negative log-probabilities of the tokens that follow, in nats."""
    return float(cross_entropy(logits.double(), next_ids, ignore_index=_NONE, reduction="sum"))


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax(p) || softmax(q)) of each row, float64, in nats; rounding never makes it negative.

    Shape: p and q [rows, vocab], result [rows].
    """
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0)


@torch.inference_mode()
def weight_distance(
    zoo: Zoo, loader: LinkLoader, original: Sequence[Link], substitute: Sequence[Link]
) -> float | None:
    """Frobenius norm of the difference of all weights over that of the original's, adapters added.

    None when a tensor is in one only or has another shape, so that there is no difference to take; also when
    all weights of the original are 0.
    """
    difference = norm = 0.0
    for mine, other in zip(original, substitute, strict=True):
        weights, others = _weights(zoo, loader, mine), _weights(zoo, loader, other)
        if weights.keys() != others.keys():
            return None
        for name, read in weights.items():
            a = read()
            b = a if mine == other else others[name]()
            if a.shape != b.shape:
                return None
            for mine_part, other_part in zip(_parts(a), _parts(b), strict=True):
                norm += float(mine_part.double().square().sum())
                difference += float((mine_part.double() - other_part.double()).square().sum())
    return (difference / norm) ** 0.5 if norm else None


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    parts: tuple[Tensor, ...] = tensor.flatten().split(PART_ELEMENTS)
    return parts


def _weights(zoo: Zoo, loader: LinkLoader, link: Link) -> Mapping[str, Callable[[], Tensor]]:
    """How to read each tensor of a base block, with what the adapters do to it."""
    adapters, block = loader.adapters(link), zoo.block(link.base)

    def read(name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if is_quantised(block.tensors, module):
            tensor = read_weight(block, module, torch.float32, loader.tensor)
        else:
            tensor = loader.tensor(block.tensors[name]).float()
        for adapter in adapters:
            tensor = adapter.merged(name, tensor)
        return tensor

    return {name: partial(read, name) for name in weight_names(block)}


def _batches(windows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Neighbouring windows of one length, about `BATCH_TOKENS` together."""
    for length, group in groupby(windows, key=len):
        alike, count = list(group), max(1, BATCH_TOKENS // length)
        yield from (alike[start : start + count] for start in range(0, len(alike), count))


def _finite(logits: Tensor, which: str) -> Tensor:
    if not bool(logits.isfinite().all()):
        raise EvaluationError(
            f"the {which} chain computes NaN or infinity",
            hint="Compute in another type with --dtype, or look for damaged weights.",
        )
    return logits
