"""Where equivalence records and decisions are kept in a zoo.

Both are created only, never changed and never collected: they are a kilobyte each, and they
say why outputs were what they were. They keep no chain or block alive either, so an older
blockzoo that does not know them can run gc on the same zoo; a record whose chains are gone
stays as history and is in force no more.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from blockzoo import layout
from blockzoo.canonical import canonical_json, digest_bytes, parse_json, seal_json, unseal_json
from blockzoo.equivalence.record_json import (
    decision_from_json,
    decision_to_json,
    record_from_json,
    record_to_json,
)
from blockzoo.equivalence.records import Decision, EquivalenceRecord, RecordId
from blockzoo.errors import (
    BlockzooError,
    CorruptManifestError,
    EquivalenceNotFoundError,
    InvalidInputError,
    NotFoundError,
)
from blockzoo.store.objects import damaged
from blockzoo.store.zoo_store import ZooStore

MIN_PREFIX = 6
"""Digits that name a record as long as no other begins with them."""


class Ledger:
    """The records and decisions of a zoo. May be used from several threads."""

    def __init__(self, store: ZooStore) -> None:
        self.store = store

    def put(self, draft: EquivalenceRecord) -> EquivalenceRecord:
        """Store a record; returns it with its id.

        Raises:
            FormatVersionError: the zoo is newer than this version can write.
            CorruptManifestError: it is stored already, and damaged.
        """
        body = canonical_json(record_to_json(draft))
        record = replace(draft, id=RecordId(digest_bytes(body)))
        if not self.put_body(record.id, body):
            return self.get(record.id)
        return record

    def put_body(self, record: RecordId, body: bytes) -> bool:
        """Store a record's bytes unless they are stored; tell whether they were not."""
        self.store.check_writable()
        return self.store.storage.put_if_absent(layout.equivalence_key(record), [body])

    def get(self, record: RecordId) -> EquivalenceRecord:
        """Return a record.

        Raises:
            EquivalenceNotFoundError: there is none of this id.
            CorruptManifestError: it is damaged.
        """
        try:
            return record_from_json(parse_json(self.body(record)), record)
        except (InvalidInputError, CorruptManifestError) as error:
            raise damaged(layout.equivalence_key(record)) from error

    def body(self, record: RecordId) -> bytes:
        """Return a record as it is stored, verified against its id; raises as `get` does."""
        key = layout.equivalence_key(record)
        try:
            data = bytes(self.store.storage.get(key))
        except NotFoundError as error:
            raise _not_found(record) from error
        if digest_bytes(data) != record:
            raise damaged(key)
        return data

    def ids(self) -> list[RecordId]:
        """Return the ids of all records, damaged ones too, in the order of the digests."""
        listing = self.store.storage.list(layout.EQUIVALENCE)
        return sorted(RecordId(digest) for info in listing if (digest := layout.digest_of(info.key)))

    def find(self, prefix: str) -> RecordId:
        """Return the id that begins with these digits.

        Raises:
            EquivalenceNotFoundError: there is none.
            InvalidInputError: they are too few, or several records begin so.
        """
        if len(prefix) < MIN_PREFIX:
            raise InvalidInputError(
                f"{prefix!r} is too short for the id of a record", hint=f"Give at least {MIN_PREFIX} digits."
            )
        found = [record for record in self.ids() if record.startswith(prefix)]
        if not found:
            raise _not_found(prefix)
        if len(found) > 1:
            raise InvalidInputError(
                f"{prefix!r} begins the ids of {len(found)} records",
                hint=f"Give more digits: {', '.join(found[:4])}.",
                record=prefix,
            )
        return found[0]

    def numbers(self) -> dict[RecordId, list[int]]:
        """Return the numbers of the decisions about each record that has any, ascending."""
        found: dict[RecordId, list[int]] = defaultdict(list)
        for info in self.store.storage.list(layout.DECISIONS):
            parsed = layout.decision_of(info.key)
            if parsed is not None:
                found[RecordId(parsed[0])].append(parsed[1])
        return {record: sorted(numbers) for record, numbers in sorted(found.items())}

    def numbers_of(self, record: RecordId) -> list[int]:
        """Return the numbers of the decisions about one record, ascending."""
        listing = self.store.storage.list(f"{layout.DECISIONS}/{record}")
        return sorted(parsed[1] for info in listing if (parsed := layout.decision_of(info.key)))

    def decision(self, record: RecordId, number: int) -> Decision:
        """Return a decision.

        Raises:
            NotFoundError: there is none of this number.
            CorruptManifestError: it is damaged.
        """
        key = layout.decision_key(record, number)
        data = self.store.storage.get(key)
        try:
            decision = decision_from_json(unseal_json(data))
        except BlockzooError as error:
            raise damaged(key) from error
        if (decision.record, decision.number) != (record, number):
            raise damaged(key)
        return decision

    def decisions(self, record: RecordId) -> list[Decision]:
        """Return all decisions about a record, first to last; raises as `decision` does."""
        return [self.decision(record, number) for number in self.numbers_of(record)]

    def put_decision(self, decision: Decision) -> bool:
        """Store a decision unless its number is taken; tell whether it was free."""
        self.store.check_writable()
        key = layout.decision_key(decision.record, decision.number)
        return self.store.storage.put_if_absent(key, [decision_body(decision)])


def decision_body(decision: Decision) -> bytes:
    """Return the bytes that a decision is stored as."""
    return seal_json(decision_to_json(decision))


def _not_found(record: str) -> EquivalenceNotFoundError:
    return EquivalenceNotFoundError(
        f"there is no equivalence record {record[:64]!r}",
        hint="List records with `blockzoo equivalence list`.",
        record=record[:64],
    )
