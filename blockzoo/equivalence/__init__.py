"""Blocks that may stand in for each other: measured on held-out text, approved by people.

    from blockzoo import Zoo
    from blockzoo.equivalence import Ledger, approve, approved_substitutes, evaluate

    zoo = Zoo.open("my-zoo")
    (record,) = evaluate(zoo, "support-bot:20-28", "base:20-28", text)
    approve(Ledger(zoo.store), record.id, by="ann", reason="overload", max_kl=0.02)
    approved_substitutes(zoo, record.original.chain)

Weight distance is measured too, and decides nothing. `forward` and `measure` need torch and are
imported when an evaluation runs.
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
from blockzoo.evaluation.evaluate import evaluate

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
    "evaluate",
    "revoke",
    "splice",
    "substituted_chain",
]
