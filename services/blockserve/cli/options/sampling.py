"""Options of the verbs that ask for answers: how tokens are drawn, and when an answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

SAMPLING = "Sampling (default: the variant's generation_config.json)"
STOPPING = "Stopping"

TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature", "-t", metavar="X", rich_help_panel=SAMPLING, help="Temperature; 0 is greedy."
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        "--top-k", metavar="N", rich_help_panel=SAMPLING, help="Sample from the N likeliest tokens; 0 is all."
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        rich_help_panel=SAMPLING,
        help="Sample from the likeliest tokens whose probabilities sum to P.",
    ),
]
MinPOption = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        metavar="P",
        rich_help_panel=SAMPLING,
        help="Leave out tokens less than P times as likely as the likeliest one.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", rich_help_panel=SAMPLING, help="Seed of the sampling noise."),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", "-m", metavar="N", rich_help_panel=STOPPING, help="Maximum number of answer tokens."
    ),
]
RepetitionPenaltyOption = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        metavar="X",
        rich_help_panel=SAMPLING,
        help="Above 1, tokens of prompt and answer become less likely; 1 is off.",
    ),
]
PresencePenaltyOption = Annotated[
    float | None,
    typer.Option(
        "--presence-penalty",
        metavar="X",
        rich_help_panel=SAMPLING,
        help="Above 0, tokens of the answer become less likely; 0 is off.",
    ),
]
FrequencyPenaltyOption = Annotated[
    float | None,
    typer.Option(
        "--frequency-penalty",
        metavar="X",
        rich_help_panel=SAMPLING,
        help="The same, in proportion to how often they occurred; 0 is off.",
    ),
]
LogitBiasOption = Annotated[
    list[str] | None,
    typer.Option(
        "--logit-bias",
        metavar="ID=X",
        rich_help_panel=SAMPLING,
        help="Add X to the logit of token ID; may be repeated.",
    ),
]


def parse_bias(given: Sequence[str] | None) -> dict[int, float] | None:
    """`ID=X` options as a mapping.

    Raises:
        typer.BadParameter: one is something else.
    """
    if given is None:
        return None
    biases: dict[int, float] = {}
    for option in given:
        token, _, bias = option.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise typer.BadParameter(
                f"{option!r} is not ID=X, as in 42=-100", param_hint="--logit-bias"
            ) from None
    return biases
