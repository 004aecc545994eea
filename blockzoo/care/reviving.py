"""Versions that were removed, under the numbers that they get when they come back.

A removed variant leaves a tombstone, and numbers up to the tombstone's are not used again
(docs/decisions/0003-tombstones.md). So version N comes back as version N + T, where T is the number of the
tombstone: all versions, in their order and with their gaps. What comes back is the same at every try, so an
interrupted restore goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import replace

from blockzoo.manifest import VariantRecord
from blockzoo.names import MAX_VERSION

REVIVED_FROM = "revived_from"
"""Entry of the provenance: the version that came back, NAME@N."""
_ROLLBACK_OF = "rollback_of"


def revived(record: VariantRecord, tombstone: int) -> VariantRecord | None:
    """A removed version as it comes back; None if its number would be too high.

    Args:
        record: the version, as the backup has it.
        tombstone: number of the newest tombstone of its name, above `record.version`.
    """
    version = record.version + tombstone
    if version > MAX_VERSION:
        return None
    provenance = {**record.provenance, REVIVED_FROM: f"{record.name}@{record.version}"}
    name, _, target = provenance.get(_ROLLBACK_OF, "").rpartition("@")
    if target.isdigit():
        # The version that it went back to comes back too, or is gone under any number.
        provenance[_ROLLBACK_OF] = f"{name}@{int(target) + tombstone}"
    return replace(record, version=version, provenance=provenance)
