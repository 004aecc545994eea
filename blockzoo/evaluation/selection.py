"""Which runs of links are compared: A and B as people name them.

==================  ========================================================================
NAME, NAME@N        the variant; with another variant, every run of positions that differ
NAME[@N]:P          the link at position P, where 0 is the embedding and layer L is at L + 1
NAME[@N]:F-E        the links at positions F to E - 1
block id            the link with this base block: in the first variant by name that has it,
                    checkpoints before adapters
==================  ========================================================================

A whole variant beside a run means the same positions of that variant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from blockzoo.digest import is_digest
from blockzoo.equivalence.records import Positions, Side
from blockzoo.errors import IncompatibleBlocksError, InvalidInputError, NotFoundError
from blockzoo.manifest import ChainManifest, VariantRecord
from blockzoo.zoo import Zoo

_RUN = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")
_HINT = "Write NAME, NAME@N, NAME:POSITION, NAME:FIRST-END (END is one past the last), or a block id."


@dataclass(frozen=True, slots=True)
class Pair:
    """What stands in for what.

    Attributes:
        original: the run A.
        substitute: the run B, of equal length.
        chain_a, chain_b: their chains.
        record_a, record_b: their variants.
    """

    original: Side
    substitute: Side
    chain_a: ChainManifest
    chain_b: ChainManifest
    record_a: VariantRecord
    record_b: VariantRecord


@dataclass(frozen=True, slots=True)
class _Named:
    """A variant, and the positions that were named of it, if any."""

    record: VariantRecord
    chain: ChainManifest
    positions: Positions | None

    def side(self, positions: Positions) -> Side:
        return Side(
            f"{self.record.name}@{self.record.version}",
            self.record.chain,
            positions,
            self.chain.links[positions.first : positions.end],
        )


def select(zoo: Zoo, a: str, b: str) -> list[Pair]:
    """Return the pairs that A and B name: several when two whole variants differ in several runs.

    The last of several is the run from the first difference to the end of the last, so that all of them
    together are measured too.

    Raises:
        InvalidInputError: it is spelled wrong, outside the chain, or nothing differs.
        VariantNotFoundError, NotFoundError: a variant or block is not registered.
        IncompatibleBlocksError: the runs or chains have different lengths.
    """
    first, second = _named(zoo, a), _named(zoo, b)
    of_a, of_b = first.positions or second.positions, second.positions or first.positions
    if of_a is not None and of_b is not None:
        return [_pair(first, second, _within(first, of_a), _within(second, of_b))]
    if len(first.chain.links) != len(second.chain.links):
        raise IncompatibleBlocksError(
            f"{a} has {len(first.chain.links)} links and {b} has {len(second.chain.links)}",
            hint="Name the runs to compare, for example NAME:5-9.",
        )
    runs = _differences(first.chain, second.chain)
    if not runs:
        raise InvalidInputError(
            f"{a} and {b} run the same links, so they are equal and need no approval",
            hint="Compare two variants that differ; `blockzoo diff A B` shows how.",
        )
    if len(runs) > 1:
        runs.append(Positions(runs[0].first, runs[-1].end))
    return [_pair(first, second, run, run) for run in runs]


def _pair(first: _Named, second: _Named, of_a: Positions, of_b: Positions) -> Pair:
    if of_a.end - of_a.first != of_b.end - of_b.first:
        raise IncompatibleBlocksError(
            f"a run of {of_a.end - of_a.first} links cannot stand in for one of {of_b.end - of_b.first}",
            hint="Name runs of equal length: keys and values are kept for each layer.",
        )
    return Pair(first.side(of_a), second.side(of_b), first.chain, second.chain, first.record, second.record)


def _named(zoo: Zoo, text: str) -> _Named:
    if is_digest(text):
        return _with_block(zoo, text)
    ref, colon, run = text.partition(":")
    positions = _parse_run(text, run) if colon else None
    record = zoo.resolve(ref)
    return _Named(record, zoo.chain(record.chain), positions)


def _parse_run(text: str, run: str) -> Positions:
    found = _RUN.fullmatch(run)
    if not found:
        raise InvalidInputError(f"{text[:200]!r} does not name a run of links", hint=_HINT)
    first = int(found[1])
    positions = Positions(first, first + 1 if found[2] is None else int(found[2]))
    if positions.end <= positions.first:
        raise InvalidInputError(f"{text[:200]!r} covers no link", hint=_HINT)
    return positions


def _with_block(zoo: Zoo, block: str) -> _Named:
    for record in sorted(zoo.variants(), key=lambda record: (record.kind != "checkpoint", record.name)):
        chain = zoo.chain(record.chain)
        for position, link in enumerate(chain.links):
            if link.base == block:
                return _Named(record, chain, Positions(position, position + 1))
    raise NotFoundError(
        f"block {block} is the base of no link of a registered variant",
        hint="Name a variant and a position: NAME:POSITION.",
        block=block,
    )


def _within(named: _Named, positions: Positions) -> Positions:
    if positions.end > len(named.chain.links):
        raise InvalidInputError(
            f"{named.record.name} has positions 0 to {len(named.chain.links) - 1}, not {positions}",
            hint="0 is the embedding, layer L is at position L + 1, the head is last.",
        )
    return positions


def _differences(a: ChainManifest, b: ChainManifest) -> list[Positions]:
    """Maximal runs of positions at which the links differ."""
    runs: list[Positions] = []
    for position, (mine, theirs) in enumerate(zip(a.links, b.links, strict=True)):
        if mine == theirs:
            continue
        if runs and runs[-1].end == position:
            runs[-1] = Positions(runs[-1].first, position + 1)
        else:
            runs.append(Positions(position, position + 1))
    return runs
