"""The verb that looks into one request: trace."""

from __future__ import annotations

from typing import Annotated

import typer

from blockserve.cli.options.connection import Connection, connects
from blockserve.cli.options.shared import JsonOption
from blockserve.cli.views.tables import print_json, print_lines, terminal_width

CALL_TIMEOUT_S = 10.0
"""Each worker of the path is given two seconds."""


@connects
def trace(
    request: Annotated[
        str,
        typer.Argument(
            metavar="REQUEST",
            help="Id of the request, as printed by `blockzoo generate` or in a worker's log.",
        ),
    ],
    as_json: JsonOption = False,
    *,
    connection: Connection,
) -> None:
    """Show how long one request spent at each worker of its path and between them.

    The parts add up to the time from the call's arrival to its last token; "other" is the part that no
    process measured. PROMPT and DECODE are the time of whole passes, which a request shares with all others
    in the batch; WAITED is the time until a worker's next pass. Hops are the round trips of the path's first
    worker, minus the time that the other workers needed. A request that changed workers shows one path after
    the other. A worker that is gone is shown as unknown. Ask the router that took the call: it remembers
    running calls and the last ones that ended (router.traced_requests).

    Name a request with `blockzoo generate --request-id`, or take the id from its --json.

    \b
    Examples:
      blockzoo trace invoice-1
      blockzoo trace invoice-1 --json | jq '.calls[-1].choices[0].parts'
    """
    from blockserve.cli.views.trace import call_to_json, draw_call

    with connection.open(timeout=CALL_TIMEOUT_S) as client:
        calls = client.trace(request)
    if as_json:
        print_json({"calls": [call_to_json(call) for call in calls]})
        return
    for number, call in enumerate(calls):
        print_lines([*([""] if number else []), *draw_call(call, terminal_width())])
