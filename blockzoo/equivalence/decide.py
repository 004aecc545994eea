"""Approving records and revoking approvals: who may stand in for whom, by whose word, within which bounds."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence

from blockzoo.equivalence.ledger import Ledger
from blockzoo.equivalence.records import Action, Decision, EquivalenceRecord, RecordId
from blockzoo.equivalence.spliced import put_spliced
from blockzoo.errors import (
    ConflictError,
    CorruptManifestError,
    InvalidInputError,
    NotEquivalentError,
    VariantNotFoundError,
)
from blockzoo.names import parse_ref
from blockzoo.store.zoo_store import ZooStore

MAX_TEXT_CHARS = 1000
"""Longest name and reason kept with a decision."""


def approve(
    ledger: Ledger,
    record_id: RecordId,
    *,
    by: str,
    reason: str,
    max_kl: float,
    min_agreement: float | None = None,
    variants: Sequence[str] = (),
    force: bool = False,
) -> Decision:
    """Allow the substitute of a record to stand in for its original, and store the chain that runs then.

    Args:
        ledger: of the zoo.
        record_id: what was measured.
        by: who decides.
        reason: why; not optional, because the next person will ask.
        max_kl: the largest mean KL to allow, in nats.
        min_agreement: the smallest top-1 agreement to allow, if it matters.
        variants: whose requests may be served so, each NAME or NAME@N of the original's chain; when none is
            given, the variant that was evaluated.
        force: approve although the numbers are beyond the bounds.

    Raises:
        EquivalenceNotFoundError, CorruptManifestError: the record is not there or damaged, or the original's
            chain.
        NotEquivalentError: the numbers are beyond the bounds, and nobody forces it.
        InvalidInputError: an argument is empty or no bound, a variant has another chain, or no registered
            variant has the substitute's chain any more.
        VariantNotFoundError: a variant is not registered.
        ConflictError: somebody else decided at the same moment.
    """
    record = ledger.get(record_id)
    by, reason = _text(by, "who approves it"), _text(reason, "why it is approved")
    _check_bound(max_kl, "the largest mean KL", math.inf)
    if min_agreement is not None:
        _check_bound(min_agreement, "the smallest agreement", 1.0)
    refs = _check_variants(ledger.store, record, variants)
    forced = _is_beyond(record, max_kl, min_agreement)
    if forced and not force:
        raise NotEquivalentError(
            f"{record.substitute} changes the outputs of {record.original} too much: mean KL "
            f"{record.mean_kl:.4g} (bound {max_kl:g}), top-1 agreement {record.top1_agreement:.2%}"
            + ("" if min_agreement is None else f" (bound {min_agreement:.2%})"),
            hint="Do not approve this pair, raise the bounds, or approve it anyway with --force.",
            record=record.id,
            mean_kl=record.mean_kl,
            max_kl=max_kl,
            top1_agreement=record.top1_agreement,
        )
    numbers = ledger.numbers_of(record_id)
    decision = Decision(
        record=record_id,
        number=(numbers[-1] if numbers else 0) + 1,
        action=Action.APPROVE,
        variants=refs,
        by=by,
        reason=reason,
        at=timestamp(ledger.store),
        max_kl=max_kl,
        min_agreement=min_agreement,
        forced=forced,
    )
    with ledger.store.registration(f"equivalence {record_id[:12]}") as registration:
        put_spliced(registration, ledger.store, record)
        # Trying again could bring back what somebody has revoked just now.
        if not ledger.put_decision(decision):
            raise ConflictError(
                f"another decision was just written about {record_id}",
                hint="Read it with `blockzoo equivalence show`, then approve again if that is still right.",
                record=record_id,
            )
    return decision


def revoke(ledger: Ledger, record_id: RecordId, *, by: str, reason: str) -> Decision:
    """End an approval, whatever else happens to the record at the same time.

    Works for a damaged record and after a damaged decision too. Returns the revocation that counts, which
    is another's when that came first.

    Raises:
        InvalidInputError: it is not approved, or an argument is empty.
    """
    by, reason = _text(by, "who revokes it"), _text(reason, "why it is revoked")
    while True:
        numbers = ledger.numbers_of(record_id)
        last = _last_action(ledger, record_id, numbers)
        if last is None:
            ledger.get(record_id)
            raise InvalidInputError(
                f"{record_id} is not approved",
                hint="List what is approved with `blockzoo equivalence list --approved`.",
                record=record_id,
            )
        if isinstance(last, Decision) and last.action is Action.REVOKE:
            return last
        decision = Decision(
            record_id, numbers[-1] + 1, Action.REVOKE, (), by, reason, timestamp(ledger.store)
        )
        if ledger.put_decision(decision):
            return decision


def timestamp(store: ZooStore) -> str:
    """Return the time by the zoo's clock, ISO 8601 in UTC."""
    return datetime.datetime.fromtimestamp(store.clock.now(), datetime.UTC).isoformat(timespec="seconds")


def _last_action(ledger: Ledger, record: RecordId, numbers: Sequence[int]) -> Decision | Action | None:
    """The last decision; only that there is one when it cannot be read, None when there is none."""
    if not numbers:
        return None
    try:
        return ledger.decision(record, numbers[-1])
    except CorruptManifestError:
        return Action.APPROVE


def _is_beyond(record: EquivalenceRecord, max_kl: float, min_agreement: float | None) -> bool:
    return record.mean_kl > max_kl or record.top1_agreement < (min_agreement or 0.0)


def _check_variants(store: ZooStore, record: EquivalenceRecord, variants: Sequence[str]) -> tuple[str, ...]:
    """Return the variants as NAME@N, all of which run the original's chain."""
    refs: list[str] = []
    for ref in variants or (record.original.variant,):
        found = store.resolve(*parse_ref(ref))
        if found.chain != record.original.chain:
            raise InvalidInputError(
                f"{found.name}@{found.version} does not run the chain that was evaluated",
                hint=f"The record is about {record.original}. Evaluate the variant's own blocks.",
                variant=ref,
                chain=record.original.chain,
            )
        refs.append(f"{found.name}@{found.version}")
    if all(other.chain != record.substitute.chain for other in store.records()):
        raise VariantNotFoundError(record.substitute.variant)
    return tuple(dict.fromkeys(refs))


def _check_bound(value: float, what: str, most: float) -> None:
    if not 0 <= value <= most or math.isinf(value):
        raise InvalidInputError(
            f"{what} is {value}, which is not a bound", hint="Give a number of at least 0."
        )


def _text(text: str, what: str) -> str:
    text = " ".join(text.split())
    if not 0 < len(text) <= MAX_TEXT_CHARS or not text.isprintable():
        raise InvalidInputError(
            f"{what} must have 1 to {MAX_TEXT_CHARS} printable characters",
            hint="It is stored with the decision.",
        )
    return text
