"""The verb `generate`: one answer, streamed."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockserve.cli.options.connection import Connection, connects
from blockserve.cli.options.conversation import (
    CONVERSATION,
    ContinueOption,
    KeepSpecialTokensOption,
    TemplateArgOption,
    TemplateOption,
    ToolsOption,
    read_tools,
    template_options,
)
from blockserve.cli.options.sampling import (
    SAMPLING,
    STOPPING,
    FrequencyPenaltyOption,
    LogitBiasOption,
    MaxTokensOption,
    MinPOption,
    PresencePenaltyOption,
    RepetitionPenaltyOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    parse_bias,
)
from blockserve.cli.options.shared import JsonOption, RefArgument
from blockserve.cli.views.plain import write_answer
from blockserve.cli.views.tables import format_seconds, note, print_json
from blockserve.cli.views.waiting import Waiting

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from blockserve.client.blocking import Client, Generation
    from blockserve.common.api.results import Completion, Finish, RequestInfo


@connects
def generate(
    model: RefArgument,
    prompt: Annotated[
        str, typer.Argument(metavar="[PROMPT]", help="The prompt; standard input if it is - or missing.")
    ] = "-",
    as_chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            "-c",
            rich_help_panel=CONVERSATION,
            help="Send the prompt as a user message, formatted by the chat template.",
        ),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            "-s",
            metavar="TEXT",
            rich_help_panel=CONVERSATION,
            help="A system message before the prompt.",
        ),
    ] = None,
    tools: ToolsOption = None,
    template_arguments: TemplateArgOption = None,
    template: TemplateOption = None,
    beginning: ContinueOption = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    seed: SeedOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    presence_penalty: PresencePenaltyOption = None,
    frequency_penalty: FrequencyPenaltyOption = None,
    logit_bias: LogitBiasOption = None,
    choices: Annotated[
        int | None,
        typer.Option("--n", metavar="N", rich_help_panel=SAMPLING, help="Number of answers to the prompt."),
    ] = None,
    max_tokens: MaxTokensOption = None,
    min_tokens: Annotated[
        int | None,
        typer.Option(
            "--min-tokens", metavar="N", rich_help_panel=STOPPING, help="Minimum number of answer tokens."
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop", metavar="TEXT", rich_help_panel=STOPPING, help="Stop before this text; may be repeated."
        ),
    ] = None,
    stop_token_ids: Annotated[
        list[int] | None,
        typer.Option(
            "--stop-token",
            metavar="ID",
            rich_help_panel=STOPPING,
            help="Stop after this token; may be repeated.",
        ),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos", rich_help_panel=STOPPING, help="Continue past the variant's end tokens."
        ),
    ] = False,
    no_special_tokens: Annotated[
        bool,
        typer.Option(
            "--no-special-tokens", help="Do not begin a text prompt with the tokenizer's special tokens."
        ),
    ] = False,
    keep_special_tokens: KeepSpecialTokensOption = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            "--logprobs",
            metavar="N",
            help="With --json: add log-probabilities, of the tokens and of N alternatives each.",
        ),
    ] = None,
    request_id: Annotated[
        str | None,
        typer.Option(
            "--request-id",
            metavar="ID",
            help="Id of the request in logs and for `blockzoo trace`. Default: a random id.",
        ),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="SECONDS", help="Give up after this many seconds.")
    ] = None,
    as_json: JsonOption = False,
    *,
    connection: Connection,
) -> None:
    """Answer one prompt and stream the text.

    The text goes to standard output; on a terminal a line about tokens, speed and the request's id follows on
    standard error. Ctrl-C cancels the request. Several answers (--n) are printed when they are complete, each
    below a separator line. Options of a conversation send the prompt as a user message, as --chat does. An
    adapter that is not registered is named by its place at the server, if the operator allows it
    (`--allow-unregistered` of `serve` and `router`).

    \b
    Examples:
      blockzoo generate smollm2 "In the beginning" --max-tokens 40
      blockzoo generate support-bot --chat "My invoice is wrong." --temperature 0
      cat report.txt | blockzoo generate legal --system "Summarise in two sentences."
      blockzoo generate qwen3 "Is 91 prime?" --template-arg enable_thinking=false
      blockzoo generate qwen3 "How warm is it in Bonn?" --tools weather.json --keep-special-tokens
      blockzoo generate support-bot "Name a fruit, as JSON." --continue '{"fruit":'
      blockzoo generate smollm2 "A name for a cat:" --n 3 --max-tokens 8
      blockzoo generate smollm2+path:/srv/adapters/bot "Hello"
      blockzoo generate smollm2 "2 + 2 =" -t 0 -m 3 --json | jq -r .text
    """
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": parse_bias(logit_bias),
        "n": choices,
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "stop": stop,
        "stop_token_ids": stop_token_ids,
        "ignore_eos": ignore_eos or None,
        "add_special_tokens": False if no_special_tokens else None,
        "skip_special_tokens": False if keep_special_tokens else None,
        "logprobs": logprobs,
        "request_id": request_id,
        "timeout": timeout,
    }
    given: Mapping[str, Any] = {name: value for name, value in options.items() if value is not None}
    conversation = template_options(template_arguments, template)
    if tools is not None:
        conversation["tools"] = read_tools(tools)
    if beginning is not None:
        conversation["continue_final_message"] = True
    as_chat = as_chat or system is not None or bool(conversation)
    if as_chat and no_special_tokens:
        raise typer.BadParameter(
            "a conversation has the special tokens that the chat template writes",
            param_hint="--no-special-tokens",
        )
    text = _read_prompt(prompt)
    with connection.open() as client:
        if as_chat:
            answer = client.chat(model, _turns(system, text, beginning), **given, **conversation)
        else:
            answer = client.generate(model, text, **given)
        with Waiting(lambda: waited_for(client, model)) as waiting:
            if choices is not None and choices > 1:
                completions = answer.results()
                waiting.end()
                _print_choices(completions, as_json=as_json)
            elif as_json:
                completion = answer.result()
                waiting.end()
                print_json(completion_to_json(completion))
            else:
                _stream(answer, waiting)


def _turns(system: str | None, text: str, beginning: str | None) -> list[dict[str, str]]:
    """The conversation of one prompt."""
    spoken = (("system", system), ("user", text), ("assistant", beginning))
    return [{"role": role, "content": content} for role, content in spoken if content is not None]


def waited_for(client: Client, model: str) -> str:
    """What an answer that has not begun waits for."""
    loaded = client.model(model).loaded
    return f"waiting for {model} to answer" if loaded else f"the server loads {model}"


def _stream(answer: Generation, waiting: Waiting) -> None:
    info: RequestInfo | None = None
    for chunk in answer:
        waiting.end()
        info = chunk.info or info
        write_answer(chunk.text)
        sys.stdout.flush()
        if chunk.finish is not None and info is not None:
            sys.stdout.write("\n")
            sys.stdout.flush()
            if sys.stderr.isatty():
                note(describe_answer(info, chunk.finish, chunk.request_id))


def _print_choices(completions: Sequence[Completion], *, as_json: bool) -> None:
    """Several answers: one JSON value, or texts with a line above each."""
    if as_json:
        print_json(choices_to_json(completions))
        return
    for completion in completions:
        write_answer(f"--- {completion.choice + 1} of {len(completions)}\n{completion.text}\n")
    sys.stdout.flush()
    if sys.stderr.isatty():
        note(describe_answer(completions[0].info, completions[0].finish, completions[0].request_id))


def describe_answer(info: RequestInfo, finish: Finish, request_id: str = "") -> str:
    """The line about an answer: who answered, how much, how soon, and what `blockzoo trace` takes."""
    usage = finish.usage
    label = f", {', '.join(info.approximations)}" if info.approximations else ""
    name = f", request {request_id}" if request_id else ""
    return (
        f"[{info.ref}{label}: {usage.prompt_tokens} + {usage.completion_tokens} tokens, "
        f"first after {format_seconds(finish.time_to_first_token)}, {finish.reason}, seed {info.seed}{name}]"
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


def choices_to_json(completions: Sequence[Completion]) -> dict[str, Any]:
    """Several answers as documented in docs/compatibility.md: what they share, and `choices`."""
    own = ("text", "token_ids", "finish_reason", "matched", "time_to_first_token", "logprobs")
    values = [completion_to_json(completion) for completion in completions]
    shared = {name: value for name, value in values[0].items() if name not in own}
    return shared | {"choices": [{name: value[name] for name in own if name in value} for value in values]}


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        return prompt
    if sys.stdin.isatty():
        raise typer.BadParameter("Give a prompt as an argument or on standard input.")
    return sys.stdin.read()
