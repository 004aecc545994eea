"""What is approved right now: the question that path assembly asks. Needs no torch.

An approval is in force while its record can be read, its newest decision approves, a variant
it names still runs the original's chain, and some registered variant still has the
substitute's. Whatever cannot be read counts as not approved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from blockzoo.equivalence.ledger import Ledger
from blockzoo.equivalence.records import (
    Action,
    Decision,
    EquivalenceRecord,
    Positions,
    RecordId,
    chain_digest,
    splice,
)
from blockzoo.errors import BlockzooError, CorruptionError, CorruptManifestError, NotFoundError
from blockzoo.manifest import ChainId, ChainManifest, VariantName, VariantRecord
from blockzoo.store.objects import Objects
from blockzoo.store.writing import Manifests
from blockzoo.store.zoo_store import ZooStore

_CACHED = 1 << 16
"""Records, decisions and refs kept in memory, a kilobyte each; what can be read never changes."""


@dataclass(frozen=True, slots=True)
class Substitute:
    """A run that may stand in for one of a chain's own.

    Attributes:
        chain: the chain B that it belongs to.
        positions: where it is in B.
        record: what was measured.
        mean_kl: see `EquivalenceRecord`.
        top1_agreement: see `EquivalenceRecord`.
        result: digest of the chain that runs with it; what the response names and the KV cache is keyed by.
        variants: NAME@N of the variants whose requests it may serve.
    """

    chain: ChainId
    positions: Positions
    record: RecordId
    mean_kl: float
    top1_agreement: float
    result: ChainId
    variants: frozenset[str]


Substitutes = Mapping[Positions, tuple[Substitute, ...]]
"""Positions of a chain -> what may run there instead, the smallest mean KL first."""

_NOTHING: Substitutes = MappingProxyType({})


class Approvals:
    """The approvals of a zoo as of the last `refresh`.

    A refresh lists decisions and variants and reads only what it has not read before, so it can be made
    every second. It is for one thread; `substitutes` may be called from any.

    Attributes:
        problems: what cannot be read and therefore counts as not approved, by key or record id.
    """

    def __init__(self, store: ZooStore) -> None:
        """Read what is approved now."""
        self._ledger = Ledger(store)
        self._variants = _LiveVariants(store)
        self._record = lru_cache(_CACHED)(self._ledger.get)
        self._decision = lru_cache(_CACHED)(self._ledger.decision)
        self._by_chain: Mapping[ChainId, Substitutes] = {}
        self._spliced: frozenset[ChainId] = frozenset()
        self.problems: Mapping[str, BlockzooError] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take notice of decisions, registrations and removals since.

        Raises:
            StorageError: the storage failed; what was known before stays.
        """
        problems: dict[str, BlockzooError] = {}
        approved: list[tuple[EquivalenceRecord, Decision]] = []
        for record_id, numbers in self._ledger.numbers().items():
            try:
                decision = self._decision(record_id, numbers[-1])
                if decision.action is Action.APPROVE:
                    approved.append((self._record(record_id), decision))
            except (CorruptionError, NotFoundError) as error:
                problems[record_id] = error
        if approved:
            self._variants.refresh()
        by_chain: dict[ChainId, dict[Positions, list[Substitute]]] = {}
        for record, decision in approved:
            substitute = self._in_force(record, decision)
            if substitute is not None:
                at = by_chain.setdefault(record.original.chain, {})
                at.setdefault(record.original.positions, []).append(substitute)
        self._by_chain = {chain: _sorted(found) for chain, found in by_chain.items()}
        results = {one.result for one in self.all()}
        self._spliced = frozenset(chain for chain in results if not self._variants.has_chain(chain))
        self.problems = problems

    def substitutes(self, chain: ChainId, variant: str | None = None) -> Substitutes:
        """Return what may stand in for runs of a chain.

        Each was measured alone; what two of them do together was not, so take one at most. (When variants
        differ in several runs, `evaluate` also measures all of them as one.)

        Args:
            chain: the chain that a request asks for.
            variant: only what may serve the requests of this NAME@N.
        """
        found = self._by_chain.get(chain, _NOTHING)
        if variant is None:
            return found
        allowed = {
            positions: tuple(one for one in group if variant in one.variants)
            for positions, group in found.items()
        }
        return {positions: group for positions, group in allowed.items() if group}

    def is_spliced(self, chain: ChainId) -> bool:
        """Tell whether a chain may run and is no registered variant's."""
        return chain in self._spliced

    def all(self) -> list[Substitute]:
        """Return what may stand in for anything."""
        groups = (group for found in self._by_chain.values() for group in found.values())
        return [one for group in groups for one in group]

    def in_force(self) -> frozenset[RecordId]:
        """Return the records whose approvals are in force."""
        return frozenset(one.record for one in self.all())

    def _in_force(self, record: EquivalenceRecord, decision: Decision) -> Substitute | None:
        variants = frozenset(
            ref for ref in decision.variants if self._variants.chain_of(ref) == record.original.chain
        )
        if not variants or not self._variants.has_chain(record.substitute.chain):
            return None
        return Substitute(
            chain=record.substitute.chain,
            positions=record.substitute.positions,
            record=record.id,
            mean_kl=record.mean_kl,
            top1_agreement=record.top1_agreement,
            result=record.result,
            variants=variants,
        )


def approved_substitutes(store: ZooStore, chain: ChainId) -> Substitutes:
    """Return what may stand in for runs of a chain, by what the zoo says at this moment.

    Callers that ask often keep an `Approvals` and refresh it, which reads only what is new.
    """
    return Approvals(store).substitutes(chain)


def substituted_chain(
    manifests: Manifests, chain: ChainId, positions: Positions, substitute: Substitute
) -> ChainManifest:
    """Return the chain that runs when a substitute is taken; it need not be stored in the zoo.

    Raises:
        CorruptManifestError: it is not the chain that was evaluated.
        ManifestNotFoundError: a chain is gone.
    """
    links = manifests.get_chain(substitute.chain).links[slice(*substitute.positions)]
    result = splice(manifests.get_chain(chain), positions, links)
    if chain_digest(result) != substitute.result:
        raise CorruptManifestError(
            f"equivalence record {substitute.record} is not about the chain it names",
            hint="Revoke the record, and evaluate again.",
            record=substitute.record,
        )
    return result


class _LiveVariants:
    """Which versions are registered, and the chains they run; a damaged ref counts as none."""

    def __init__(self, store: Objects) -> None:
        self._store = store
        self._read = lru_cache(_CACHED)(store.read_ref)
        self._chains: dict[str, ChainId] = {}
        self._known: set[ChainId] = set()

    def refresh(self) -> None:
        self._chains = {
            f"{name}@{record.version}": record.chain
            for name, numbers in self._store.numbers().items()
            for record in self._live(name, numbers)
        }
        self._known = set(self._chains.values())

    def chain_of(self, ref: str) -> ChainId | None:
        return self._chains.get(ref)

    def has_chain(self, chain: ChainId) -> bool:
        return chain in self._known

    def _live(self, name: VariantName, numbers: list[int]) -> list[VariantRecord]:
        """The versions above the last tombstone."""
        live: list[VariantRecord] = []
        for number in reversed(numbers):
            try:
                record = self._read(name, number)
            except (CorruptionError, NotFoundError):
                continue
            if record.deleted:
                break
            live.append(record)
        return live


def _sorted(found: Mapping[Positions, list[Substitute]]) -> Substitutes:
    return MappingProxyType(
        {
            positions: tuple(sorted(found[positions], key=lambda one: (one.mean_kl, one.record)))
            for positions in sorted(found)
        }
    )
