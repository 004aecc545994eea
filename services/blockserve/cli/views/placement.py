"""What `blockzoo place` and its kin show: the wishes about where variants are held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockserve.cli.views.tables import NAMES, Column, Table, counted, print_table, say, some

if TYPE_CHECKING:
    from blockserve.common.api.placement import WishStatus


def describe_wish(status: WishStatus) -> str:
    """What is wished about a variant, in a few words."""
    parts = [
        "pinned" if status.pinned else "",
        counted(status.replicas, "replica") if status.replicas else "",
        f"on {', '.join(status.workers)}" if status.workers else "",
        f"not on {', '.join(status.avoid)}" if status.avoid else "",
    ]
    return ", ".join(part for part in parts if part) or "no wishes, its traffic decides"


def print_wishes(wishes: Sequence[WishStatus]) -> None:
    """`place` without arguments."""
    if not wishes:
        say("No placement wishes; traffic decides what is loaded where.")
        return
    folded = (Column("WISHED", folds=16, cuts=NAMES), Column("PLACED ON", folds=16, cuts=NAMES))
    table = Table((Column("VARIANT", cuts=NAMES), *folded, Column("SINCE", rank=1)))
    for status in wishes:
        placed = some(status.placed, 6) or ("-" if status.chain else "nowhere: not registered")
        table.add(status.variant, describe_wish(status), placed, status.since[:10])
    print_table(table)
