"""The verb `generate`: one answer, streamed."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockserve.cli.connection import Connection, connects
from blockserve.cli.failures import USAGE
from blockserve.cli.options import JsonOption, RefArgument
from blockserve.cli.output import format_seconds, note, print_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blockserve.router.results import Completion, Finish, RequestInfo

SAMPLING = "Sampling (unset: what the variant's authors chose)"
STOPPING = "Stopping"

TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", "-t", metavar="X", rich_help_panel=SAMPLING, help="0 is greedy."),
]
TopKOption = Annotated[
    int | None,
    typer.Option("--top-k", metavar="N", rich_help_panel=SAMPLING, help="Keep the N likeliest; 0 keeps all."),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p", metavar="P", rich_help_panel=SAMPLING, help="Keep the likeliest with this mass together."
    ),
]
MinPOption = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        metavar="P",
        rich_help_panel=SAMPLING,
        help="Keep those at least P times as likely as the likeliest.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", rich_help_panel=SAMPLING, help="Fixes the noise of sampling."),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option("--max-tokens", "-m", metavar="N", rich_help_panel=STOPPING, help="Most tokens to answer."),
]


@connects
def generate(
    model: RefArgument,
    prompt: Annotated[
        str, typer.Argument(metavar="[PROMPT]", help="The text; - or nothing reads it from standard input.")
    ] = "-",
    as_chat: Annotated[
        bool,
        typer.Option("--chat", "-c", help="Take the prompt as a user's turn, written by the chat template."),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option("--system", "-s", metavar="TEXT", help="A system turn before it; implies --chat."),
    ] = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    seed: SeedOption = None,
    max_tokens: MaxTokensOption = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop", metavar="TEXT", rich_help_panel=STOPPING, help="Ends before this text; repeatable."
        ),
    ] = None,
    stop_token_ids: Annotated[
        list[int] | None,
        typer.Option(
            "--stop-token", metavar="ID", rich_help_panel=STOPPING, help="Ends after it; repeatable."
        ),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", rich_help_panel=STOPPING, help="Go on past the variant's end tokens."),
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            "--logprobs", metavar="N", help="With --json: log-probabilities, and those of N alternatives."
        ),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="SECONDS", help="Give up after this long.")
    ] = None,
    as_json: JsonOption = False,
    *,
    connection: Connection,
) -> None:
    """Answer one prompt, streaming the text as it comes.

    The text goes to standard output; on a terminal a line about tokens and speed follows on standard error.
    Ctrl-C cancels the request.

    \b
    Examples:
      blockzoo generate smollm2 "In the beginning" --max-tokens 40
      blockzoo generate support-bot --chat "My invoice is wrong." --temperature 0
      cat report.txt | blockzoo generate legal --system "Summarise in two sentences."
      blockzoo generate smollm2 "2 + 2 =" -t 0 -m 3 --json | jq -r .text
    """
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "max_tokens": max_tokens,
        "stop": stop,
        "stop_token_ids": stop_token_ids,
        "ignore_eos": ignore_eos or None,
        "logprobs": logprobs,
        "timeout": timeout,
    }
    given: Mapping[str, Any] = {name: value for name, value in options.items() if value is not None}
    text = _read_prompt(prompt)
    with connection.open() as client:
        if as_chat or system is not None:
            turns = [] if system is None else [{"role": "system", "content": system}]
            answer = client.chat(model, [*turns, {"role": "user", "content": text}], **given)
        else:
            answer = client.generate(model, text, **given)
        if as_json:
            print_json(completion_to_json(answer.result()))
            return
        info: RequestInfo | None = None
        for chunk in answer:
            info = chunk.info or info
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
            if chunk.finish is not None and info is not None:
                sys.stdout.write("\n")
                sys.stdout.flush()
                if sys.stderr.isatty():
                    note(describe_answer(info, chunk.finish))


def describe_answer(info: RequestInfo, finish: Finish) -> str:
    """The line about an answer: who answered, how much, how soon."""
    usage = finish.usage
    label = f", {', '.join(info.approximations)}" if info.approximations else ""
    return (
        f"[{info.ref}{label}: {usage.prompt_tokens} + {usage.completion_tokens} tokens, "
        f"first after {format_seconds(finish.time_to_first_token)}, {finish.reason}, seed {info.seed}]"
    )


def completion_to_json(completion: Completion) -> dict[str, Any]:
    """The answer as documented in docs/compatibility.md."""
    info, finish = completion.info, completion.finish
    value: dict[str, Any] = {
        "request_id": completion.request_id,
        "model": info.model,
        "version": info.version,
        "chain": info.chain_digest,
        "approximations": list(info.approximations),
        "seed": info.seed,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": str(finish.reason),
        "matched": finish.matched,
        "usage": dataclasses.asdict(finish.usage),
        "time_to_first_token": finish.time_to_first_token,
    }
    if completion.logprobs:
        value["logprobs"] = [dataclasses.asdict(position) for position in completion.logprobs]
    return value


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        return prompt
    if sys.stdin.isatty():
        note("Give a prompt, or pipe it in; see `blockzoo generate --help`.")
        raise typer.Exit(USAGE)
    return sys.stdin.read()
