"""Blocks that may stand in for each other: measured on held-out text, approved by people.

    from blockzoo import Zoo
    from blockzoo.equivalence import Ledger, approve, approved_substitutes
    from blockzoo.evaluation.evaluate import evaluate

    zoo = Zoo.open("my-zoo")
    (record,) = evaluate(zoo, "support-bot:20-28", "base:20-28", text)
    approve(Ledger(zoo.store), record.id, by="ann", reason="overload", max_kl=0.02)
    approved_substitutes(zoo.store, record.original.chain)

Records, decisions and what is approved by them are here, and none of it needs torch; `blockzoo.evaluation`
makes the records. It measures the distance of weights too, which no decision depends on.
"""

from __future__ import annotations

from blockzoo.equivalence.approvals import (
    Approvals,
    Substitute,
    Substitutes,
    approved_substitutes,
    substituted_chain,
)
from blockzoo.equivalence.decide import approve, revoke
from blockzoo.equivalence.ledger import Ledger
from blockzoo.equivalence.records import (
    Action,
    Decision,
    EquivalenceRecord,
    Positions,
    RecordId,
    Side,
    chain_digest,
    splice,
)

__all__ = [
    "Action",
    "Approvals",
    "Decision",
    "EquivalenceRecord",
    "Ledger",
    "Positions",
    "RecordId",
    "Side",
    "Substitute",
    "Substitutes",
    "approve",
    "approved_substitutes",
    "chain_digest",
    "revoke",
    "splice",
    "substituted_chain",
]
