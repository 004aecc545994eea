"""What `blockzoo equivalence` shows: records of what was measured, and decisions about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockserve.cli.views.tables import (
    Column,
    Table,
    draw_facts,
    fit,
    print_lines,
    print_table,
    say,
    short,
    terminal_width,
)

if TYPE_CHECKING:
    from blockzoo.equivalence import Decision, EquivalenceRecord
    from blockzoo.equivalence.overview import EquivalenceReport


def print_measured(records: Sequence[EquivalenceRecord]) -> None:
    """`equivalence evaluate`."""
    table = _table()
    for record in records:
        _add_record(table, record)
    print_table(table)
    used = records[0]
    say(f"{used.num_tokens} tokens in windows of {used.window_tokens}, {used.dtype}.")
    best = records[-1].id
    say(f"To approve: blockzoo equivalence approve {short(best)} --max-kl BOUND --reason WHY")


def print_records(reports: Sequence[EquivalenceReport]) -> None:
    """`equivalence list`."""
    table = _table("STATE", "DATE")
    for report in reports:
        _add_record(table, report.record, _state(report), report.record.created_at[:10])
    print_table(table)


def _table(*more: str) -> Table:
    names = (
        Column("ID"),
        Column("A", folds=16, cuts=24, tight=16),
        Column("B IN ITS PLACE", folds=13, cuts=24, tight=13),
    )
    numbers = ("KL", 0), ("WORST", 2), ("TOP-1", 0), ("WEIGHTS", 4), ("TOKENS", 3)
    numeric = (Column(name, numeric=True, rank=rank) for name, rank in numbers)
    return Table((*names, *numeric, *(Column(name, folds=12, rank=int(name == "DATE")) for name in more)))


def _add_record(table: Table, record: EquivalenceRecord, *more: object) -> None:
    table.add(
        short(record.id),
        record.original,
        record.substitute,
        f"{record.mean_kl:.3g}",
        f"{record.worst_kl:.3g}",
        f"{record.top1_agreement:.1%}",
        "-" if record.weight_distance is None else f"{record.weight_distance:.2g}",
        record.num_tokens,
        *more,
    )


def _state(report: EquivalenceReport) -> str:
    if report.state == "approved" and not report.in_force:
        return "approved, variant gone"
    return report.state


def print_record(report: EquivalenceReport) -> None:
    """`equivalence show`."""
    record = report.record
    print_lines(fit(f"{record.id}, {_state(report)}", terminal_width()))
    weights = "not compared, because shapes differ"
    if record.weight_distance is not None:
        weights = f"relative distance {record.weight_distance:.4g} (for information only)"
    facts = {
        "A": f"{record.original}, chain {record.original.chain}",
        "B in its place": f"{record.substitute}, chain {record.substitute.chain}",
        "chain that runs": record.result,
        "mean KL": f"{record.mean_kl:.4g} nats, at most {record.worst_kl:.4g} at a position",
        "top-1 agreement": f"{record.top1_agreement:.2%}",
        "weights": weights,
        "text": f"{record.num_tokens} tokens of {record.text_bytes} bytes, BLAKE3 {record.text_digest}",
        "computed": f"{record.created_at}, windows of {record.window_tokens} tokens, {record.dtype}, "
        f"blockzoo {record.blockzoo_version}",
    }
    print_lines(draw_facts(facts, terminal_width()))
    if report.decisions:
        say("")
        table = Table(
            (
                Column("NO", numeric=True),
                Column("DECISION", folds=10),
                Column("FOR", folds=16, cuts=16),
                Column("BOUND", folds=12),
                Column("BY", folds=14, cuts=14),
                Column("AT", rank=2),
                Column("REASON", folds=14, cuts=14),
            )
        )
        for one in report.decisions:
            what = f"{one.action} (forced)" if one.forced else one.action
            cells = (", ".join(one.variants) or "-", _bound(one), one.by, one.at, one.reason)
            table.add(one.number, what, *cells)
        print_table(table)


def _bound(decision: Decision) -> str:
    if decision.max_kl is None:
        return "-"
    agreement = "" if decision.min_agreement is None else f", top-1 >= {decision.min_agreement:.1%}"
    return f"KL <= {decision.max_kl:g}{agreement}"
