"""Blocks that may stand in for each other: measure, list, approve, revoke.

While a variant's own blocks are not loaded or overloaded, a cluster may answer with an approved equivalent,
if the variant and the caller both allow it. The measure is how much the outputs change on your own text, not
how similar the weights are. Nothing is approved automatically.

\b
Examples:
  blockzoo equivalence evaluate support-bot base --text held-out.txt
  blockzoo equivalence list
  blockzoo equivalence approve 3f9c21d07ab4 --max-kl 0.02 --reason "may answer under overload"
"""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockserve.cli.options.place import Place, at_a_place, at_hand
from blockserve.cli.options.shared import DEFAULT_ZOO, JsonOption, ZooOption, open_zoo
from blockserve.cli.views.equivalence import print_measured, print_record, print_records
from blockserve.cli.views.progress import progress
from blockserve.cli.views.tables import note, print_json, say, short

if TYPE_CHECKING:
    from blockzoo.equivalence import Decision
    from blockzoo.equivalence.overview import EquivalenceReport

_WHAT = "NAME, NAME@N, NAME:POSITION, NAME:FIRST-END or a block id."

RecordArgument = Annotated[
    str, typer.Argument(metavar="ID", help="The record, or its first digits (at least 6).")
]
ByOption = Annotated[
    str | None,
    typer.Option("--by", metavar="WHO", help="Name of the person who decides. Default: your user name."),
]


@at_hand
def evaluate(
    a: Annotated[str, typer.Argument(metavar="A", help=f"The part to replace: {_WHAT}")],
    b: Annotated[str, typer.Argument(metavar="B", help=f"The part that stands in for it: {_WHAT}")],
    text: Annotated[
        Path,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Held-out text in UTF-8, or - for standard input: text like your callers send, on which "
            "neither model was trained. There is no default, because only your text is like your "
            "traffic.",
        ),
    ],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", help="Compare the first N tokens of the text.")
    ] = 4096,
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            metavar="N",
            help="Tokens per window; tokens attend only within their window. "
            "Default: 512, or the model's context length if that is shorter.",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="TYPE", help="Compute in float32, bfloat16 or float16.")
    ] = "float32",
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda or cuda:1.")] = "cpu",
    zoo: ZooOption = DEFAULT_ZOO,
    as_json: JsonOption = False,
) -> None:
    """Measure how A's outputs change when B stands in for A, and record the result.

    A's chain runs unchanged, and with B's links in place of its own. KL is the mean divergence of the next
    token's probabilities over all positions, in nats (lower is closer). TOP-1 is the share of positions with
    the same most likely token (higher is closer). WEIGHTS is the relative distance of the weights, for
    information only.

    Positions number the links of a chain: 0 is the embedding, layer L is at L + 1, the head is last; END is
    one past the last. Two whole variants are compared run by run wherever their links differ, and if there
    are several such runs also all together. A record covers one direction only: swap A and B for the other.
    This computes on the zoo itself and takes no --server.

    \b
    Examples:
      blockzoo equivalence evaluate support-bot base --text held-out.txt
      blockzoo equivalence evaluate support-bot:20-28 base --text held-out.txt
      blockzoo equivalence evaluate legal@2:5 legal@1:5 --text held-out.txt --max-tokens 20000
      cat *.txt | blockzoo equivalence evaluate a b --text - --json | jq '.records[].mean_kl'
    """
    from blockzoo.evaluation.evaluate import evaluate as measure
    from blockzoo.evaluation.tokens import MAX_TEXT_BYTES, decode_text

    place = open_zoo(zoo)
    if str(text) == "-":
        data = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    else:
        with text.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    options: dict[str, Any] = {"max_tokens": max_tokens, "window_tokens": window}
    with progress(unit="tokens") as reporter:
        records = measure(
            place, a, b, decode_text(data), dtype=dtype, device=device, progress=reporter, **options
        )
    if as_json:
        from blockzoo.equivalence import Ledger
        from blockzoo.equivalence.overview import report

        ledger = Ledger(place.store)
        print_json({"records": [_as_json(report(ledger, record.id)) for record in records]})
        return
    print_measured(records)


@at_a_place
def list_(
    approved: Annotated[bool, typer.Option("--approved", help="Only approvals that are in force.")] = False,
    as_json: JsonOption = False,
    *,
    place: Place,
) -> None:
    """List records and their approvals, newest first.

    An approval is in force only while a variant it names runs A's chain and a registered variant runs B's.

    \b
    Examples:
      blockzoo equivalence list
      blockzoo equivalence list --approved
      blockzoo equivalence list --json | jq '.records[] | select(.in_force) | .id'
    """
    with place.open() as zoo:
        found = zoo.equivalences()
    reports = [report for report in found.records if report.in_force or not approved]
    if as_json:
        print_json({"records": [_as_json(report) for report in reports], "unreadable": found.unreadable})
        return
    if reports:
        print_records(reports)
    elif approved:
        say("Nothing is approved. `blockzoo equivalence list` shows what was measured.")
    else:
        say("Nothing was measured yet: blockzoo equivalence evaluate A B --text FILE")
    for record, problem in found.unreadable.items():
        note(f"{short(record)} cannot be read and counts as not approved: {problem}")


@at_a_place
def show(record: RecordArgument, as_json: JsonOption = False, *, place: Place) -> None:
    """Show one record: what was compared, the numbers, and every decision about it.

    \b
    Examples:
      blockzoo equivalence show 3f9c21d07ab4
      blockzoo equivalence show 3f9c21d07ab4 --json | jq .decisions
    """
    with place.open() as zoo:
        found = zoo.equivalence(record)
    if as_json:
        print_json(_as_json(found))
    else:
        print_record(found)


@at_a_place
def approve(
    record: RecordArgument,
    max_kl: Annotated[
        float,
        typer.Option("--max-kl", metavar="NATS", help="Refuse to approve if the mean KL is above this."),
    ],
    reason: Annotated[
        str, typer.Option("--reason", metavar="WHY", help="The reason, kept with the decision.")
    ],
    min_agreement: Annotated[
        float | None,
        typer.Option(
            "--min-agreement",
            metavar="SHARE",
            help="Refuse to approve if the top-1 agreement is below this (0 to 1).",
        ),
    ] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            metavar="VARIANT",
            help="Variant whose requests may use the substitute; may be repeated. It must run the evaluated "
            "chain. Default: the variant that was evaluated.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Approve even if the numbers exceed the bounds.")
    ] = False,
    by: ByOption = None,
    as_json: JsonOption = False,
    *,
    place: Place,
) -> None:
    """Allow B to stand in for A, as measured by one record.

    The approval covers exactly these versions in this direction, and each caller has to allow equivalents
    too. The bounds, and whether --force was used, are kept with the decision.

    \b
    Examples:
      blockzoo equivalence approve 3f9c21d07ab4 --max-kl 0.02 --reason "may answer under overload"
      blockzoo equivalence approve 3f9c21d07ab4 --max-kl 0.02 --min-agreement 0.95 --reason tested --by ann
      blockzoo equivalence approve 3f9c21d07ab4 --max-kl 0.02 --reason "incident, until Monday" --force
    """
    who = _who(by)
    with place.open() as zoo:
        decision, about = zoo.approve_equivalence(
            record,
            by=who,
            reason=reason,
            max_kl=max_kl,
            min_agreement=min_agreement,
            variants=variants or (),
            force=force,
        )
    if as_json:
        print_json(_decision_json(decision))
        return
    forced = ", forced beyond the bounds" if decision.forced else ""
    say(
        f"Approved{forced}: requests of {', '.join(decision.variants)} may run {about.substitute} "
        f"in place of {about.original}."
    )
    say(f"To end it: blockzoo equivalence revoke {short(decision.record)}")


@at_a_place
def revoke(
    record: RecordArgument,
    reason: Annotated[
        str, typer.Option("--reason", metavar="WHY", help="The reason, kept with the decision.")
    ] = "not said",
    by: ByOption = None,
    as_json: JsonOption = False,
    *,
    place: Place,
) -> None:
    """End an approval at once.

    Works even if the record cannot be read. The record stays, and can be approved again.

    \b
    Examples:
      blockzoo equivalence revoke 3f9c21d07ab4
      blockzoo equivalence revoke 3f9c21d07ab4 --reason "complaints about tone"
    """
    who = _who(by)
    with place.open() as zoo:
        decision = zoo.revoke_equivalence(record, by=who, reason=reason)
    if as_json:
        print_json(_decision_json(decision))
    else:
        say(f"Revoked {short(decision.record)} at {decision.at} by {decision.by}.")


VERBS = (evaluate, list_, show, approve, revoke)


def _who(by: str | None) -> str:
    if by is not None:
        return by
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise typer.BadParameter(
            "Your user has no name on this machine: name the person who decides.", param_hint="--by"
        ) from None


def _as_json(report: EquivalenceReport) -> dict[str, Any]:
    value = report.to_json()
    record = value.pop("record")
    return {"id": record.pop("id"), **record, **value}


def _decision_json(decision: Decision) -> dict[str, Any]:
    from blockzoo.equivalence.record_json import decision_to_json

    value: dict[str, Any] = dict(decision_to_json(decision))
    return {**value, "max_kl": decision.max_kl, "min_agreement": decision.min_agreement}
