"""What the zoo stores about blocks that may stand in for each other. Frozen values without I/O.

A record is what one evaluation measured; a decision is what somebody made of it. Both are
immutable. A record's id is the BLAKE3 of its canonical JSON, decisions about it are numbered.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple, NewType

from blockzoo.canonical import digest_json
from blockzoo.manifest import BlobId, ChainId, ChainManifest, Link
from blockzoo.manifest_json import chain_to_json

RecordId = NewType("RecordId", str)
"""64 lower-case hex digits: BLAKE3 of an equivalence record's canonical JSON."""


class Positions(NamedTuple):
    """A run of a chain's links: `first` to `end` - 1, where 0 is the embedding."""

    first: int
    end: int

    def __str__(self) -> str:
        """As the command line spells it: `5`, or `5-9` for 5, 6, 7 and 8."""
        return str(self.first) if self.end == self.first + 1 else f"{self.first}-{self.end}"


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two runs that were compared, inside its chain.

    Attributes:
        variant: NAME@N of a variant of that chain when it was evaluated, for people.
        chain: the chain.
        positions: where the run is.
        links: the links there, adapters included.
    """

    variant: str
    chain: ChainId
    positions: Positions
    links: tuple[Link, ...]

    def __str__(self) -> str:
        """As the command line takes it: NAME@N:POSITIONS."""
        return f"{self.variant}:{self.positions}"


@dataclass(frozen=True, slots=True)
class EquivalenceRecord:
    """How much the outputs of a chain change when another run stands in for one of its own.

    Attributes:
        original: the run A and the chain whose outputs were compared.
        substitute: the run B that stood in for it.
        result: digest of the chain that ran with B in A's place.
        mean_kl: mean over positions of KL(original || substituted) of the next token, in nats.
        worst_kl: the largest of them.
        top1_agreement: share of positions at which the most likely token is the same.
        weight_distance: |A - B| / |A| over all weights of the run, adapters added (Frobenius norm); None
            where shapes differ. For people: nothing is decided by it.
        num_tokens: positions that were compared.
        window_tokens: most tokens that attended to each other.
        text_digest: BLAKE3 of the text in UTF-8.
        text_bytes: length of the text, of which the first `num_tokens` tokens were used.
        tokenizer: blob of the original's tokenizer.json.
        dtype: type that both were computed in, as torch names it.
        created_at: ISO 8601, UTC.
        blockzoo_version: of the program that measured.
        id: digest of the above, "" before it is stored.
    """

    original: Side
    substitute: Side
    result: ChainId
    mean_kl: float
    worst_kl: float
    top1_agreement: float
    weight_distance: float | None
    num_tokens: int
    window_tokens: int
    text_digest: str
    text_bytes: int
    tokenizer: BlobId
    dtype: str
    created_at: str
    blockzoo_version: str
    id: RecordId = RecordId("")


class Action(enum.StrEnum):
    """What a decision does."""

    APPROVE = "approve"
    REVOKE = "revoke"


@dataclass(frozen=True, slots=True)
class Decision:
    """An approval of a record, or the end of one. The highest number counts.

    Attributes:
        record: what it is about.
        number: 1, 2, ...
        action: approve or revoke.
        variants: NAME@N of the variants whose requests B may serve; none for a revocation.
        by: who decided.
        reason: why.
        at: ISO 8601, UTC.
        max_kl: the largest mean KL that was to be approved, in nats; None for a revocation.
        min_agreement: the smallest top-1 agreement that was to be approved, or None.
        forced: approved although the numbers are beyond these bounds.
    """

    record: RecordId
    number: int
    action: Action
    variants: tuple[str, ...]
    by: str
    reason: str
    at: str
    max_kl: float | None = None
    min_agreement: float | None = None
    forced: bool = False


def splice(chain: ChainManifest, positions: Positions, links: tuple[Link, ...]) -> ChainManifest:
    """Return the chain that runs when `links` stand in for those at `positions`."""
    joined = (*chain.links[: positions.first], *links, *chain.links[positions.end :])
    return ChainManifest(chain.family, joined, chain.context_length, chain.vocab_size)


def chain_digest(chain: ChainManifest) -> ChainId:
    """Return the id of a chain, whether it is stored or not."""
    return ChainId(digest_json(chain_to_json(chain)))
