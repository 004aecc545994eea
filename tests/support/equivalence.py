"""Equivalence records made by hand, for tests that compute nothing."""

from dataclasses import replace

from blockzoo.equivalence import (
    EquivalenceRecord,
    Ledger,
    Positions,
    Side,
    Substitutes,
    approved_substitutes,
    chain_digest,
    splice,
)
from blockzoo.manifest import BlobId, VariantRecord
from blockzoo.store.zoo_store import ZooStore
from support.zoo_faults import open_memory, register, tensor

WHO = {"by": "ann", "reason": "tried on our tickets"}
"""Who decides, and why."""


def three_variants() -> ZooStore:
    """A zoo with the variants a, b and c, which share their first link."""
    store = open_memory()
    register(store, "a", [tensor(1), tensor(2)])
    register(store, "b", [tensor(1), tensor(3)])
    register(store, "c", [tensor(1), tensor(4)])
    return store


def draft(
    store: ZooStore, original: VariantRecord, substitute: VariantRecord, *, kl: float = 0.01, at: int = 0
) -> EquivalenceRecord:
    """What an evaluation of one link of two variants could have measured; not stored."""
    chains = [store.get_chain(record.chain) for record in (original, substitute)]
    run = Positions(at, at + 1)
    sides = [
        Side(f"{record.name}@{record.version}", record.chain, run, chain.links[at : at + 1])
        for record, chain in zip((original, substitute), chains, strict=True)
    ]
    return EquivalenceRecord(
        original=sides[0],
        substitute=sides[1],
        result=chain_digest(splice(chains[0], run, sides[1].links)),
        mean_kl=kl,
        worst_kl=10 * kl,
        top1_agreement=1 - kl,
        weight_distance=0.25,
        num_tokens=4096,
        window_tokens=512,
        text_digest="ab" * 32,
        text_bytes=20_000,
        tokenizer=BlobId("cd" * 32),
        dtype="float32",
        created_at="2026-11-24T11:00:00+00:00",
        blockzoo_version="0.1.0",
    )


def put(store: ZooStore, original: str, substitute: str, **options: float) -> EquivalenceRecord:
    """Store such a record."""
    return Ledger(store).put(draft(store, store.resolve(original), store.resolve(substitute), **options))


def without_id(record: EquivalenceRecord) -> EquivalenceRecord:
    """The record as it was before it was stored."""
    return replace(record, id="")


def substitutes(store: ZooStore, name: str = "a") -> Substitutes:
    """What may stand in for runs of a variant's chain right now."""
    return approved_substitutes(store, store.resolve(name).chain)


def overwrite(store: ZooStore, key: str, data: bytes) -> None:
    """Damage an object."""
    store.storage.replace(key, [data])
