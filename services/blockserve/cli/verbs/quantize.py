"""Make a quantised copy of a variant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from blockserve.cli.options.place import at_hand
from blockserve.cli.options.shared import DEFAULT_ZOO, JsonOption, ZooOption, open_zoo
from blockserve.cli.views.progress import progress
from blockserve.cli.views.reports import print_quantised
from blockserve.cli.views.tables import print_json


@at_hand
def quantize(
    variant: Annotated[str, typer.Argument(metavar="VARIANT", help="NAME, or NAME@N for an old version.")],
    fmt: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="int8: weights and activations of all linear layers; half the memory of bfloat16.",
        ),
    ] = "int8",
    name: Annotated[
        str | None,
        typer.Option("--name", "-n", metavar="NAME", help="Name of the new variant; by default NAME-FORMAT."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Held-out text in UTF-8, or - for standard input: the loss of quality is measured on it and "
            "kept with the variant.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=64, help="Measure the first N tokens of the text.")
    ] = 4096,
    zoo: ZooOption = DEFAULT_ZOO,
    as_json: JsonOption = False,
) -> None:
    """Make a quantised copy of a variant. Its answers are approximately those of the original.

    The original stays, and callers choose by name. Embedding, norms, biases and adapters are shared with it;
    variants that share blocks share the quantised ones too, so quantise each of them. Measure with --text:
    without it nobody knows what the quantised variant lost. A quantised variant cannot be exported or adapted
    further; both is possible with the original. This computes on the zoo itself and takes no --server.

    \\b
    Examples:
      blockzoo quantize smollm2 --text held-out.txt
      blockzoo quantize support-bot --name support-bot-fast --text held-out.txt
      blockzoo quantize smollm2 --json | jq '.quality.perplexities'
    """
    from blockzoo.evaluation.tokens import MAX_TEXT_BYTES, decode_text
    from blockzoo.quantising.quantise import quantise

    held_out = None
    if text is not None:
        with sys.stdin.buffer if str(text) == "-" else text.open("rb") as file:
            held_out = decode_text(file.read(MAX_TEXT_BYTES + 1))
    place = open_zoo(zoo)
    with progress(unit="done") as reporter:
        result = quantise(
            place, variant, name=name, fmt=fmt, text=held_out, max_tokens=max_tokens, progress=reporter
        )
    if as_json:
        print_json(result.to_json())
    else:
        print_quantised(result)
