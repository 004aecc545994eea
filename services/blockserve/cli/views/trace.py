"""What `blockzoo trace` shows of a call: the paths of each answer, and parts of its time that add up."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from blockserve.cli.views.tables import NAMES, Column, Table, fit, format_seconds
from blockserve.cli.views.words import describe_run, last_position

if TYPE_CHECKING:
    from blockserve.common.api.call_trace import CallTrace, ChoiceTrace
    from blockserve.common.api.spans import PathTrace, SpanTimes
    from blockserve.router.traces.parts import Part

COLUMNS = (
    Column("PART", folds=20, cuts=NAMES),
    Column("HOLDS", folds=22, rank=3),
    Column("TOKENS", numeric=True, rank=2),
    Column("PROMPT", numeric=True, rank=5),
    Column("DECODE", numeric=True, rank=4),
    Column("PER TOKEN", numeric=True, rank=1),
    Column("LONGEST", numeric=True, rank=7),
    Column("WAITED", numeric=True, rank=6),
    Column("TIME", numeric=True),
    Column("SHARE", numeric=True),
)


def draw_call(call: CallTrace, width: int | None) -> list[str]:
    """A call for people, as lines of at most `width` columns; None where lines may be long."""
    lines = [line for text in _headline(call) for line in fit(text, width)]
    for choice in call.choices:
        lines += ["", *fit(_choice_line(choice, len(call.choices)), width)]
        for path in choice.paths:
            lines += fit(_path_line(path), width)
        lines += _table(choice).lines(width)
    return lines


def call_to_json(call: CallTrace) -> dict[str, Any]:
    """A call as documented in docs/compatibility.md: with the parts of each answer's time."""
    value = dataclasses.asdict(call)
    for shown, choice in zip(value["choices"], call.choices, strict=True):
        shown["parts"] = _parts_to_json(choice)
    return value


def _parts_to_json(choice: ChoiceTrace) -> list[dict[str, Any]]:
    from blockserve.router.traces.parts import parts_of

    return [
        {
            "kind": str(part.kind),
            "epoch": part.epoch,
            "worker": None if part.step is None else part.step.name,
            "seconds": part.seconds,
            "per_token": part.per_token,
        }
        for part in parts_of(choice)
    ]


def _headline(call: CallTrace) -> tuple[str, str]:
    model = f"{call.model}@{call.version}" if call.version else call.model
    tokens = sum(choice.tokens for choice in call.choices)
    return (
        f"request {call.request_id}  {model}, {call.prompt_tokens} + {tokens} tokens, {call.outcome}, "
        f"{_ms(call.seconds)}; it came {format_seconds(call.age)} ago",
        f"variant found in {_ms(call.resolving)}, prompt tokenised in {_ms(call.tokenising)}",
    )


def _choice_line(choice: ChoiceTrace, count: int) -> str:
    name = f"answer {choice.choice + 1} of {count}: " if count > 1 else ""
    first = "no token yet" if choice.first_token is None else f"first token after {_ms(choice.first_token)}"
    return f"{name}{first}, {choice.tokens} tokens after {_ms(choice.seconds)}"


def _path_line(path: PathTrace) -> str:
    names = " -> ".join(step.name or "this process" for step in path.steps) or "being chosen"
    opened = path.steps[0].times.attempts if path.steps and path.steps[0].times else 1
    told = [f"path {path.epoch}: {names}"]
    told += [f"opened {opened} times"] if opened > 1 else []
    told += [f"keys and values: {path.moved}"] if path.moved else []
    told += [f"left: {path.ended}"] if path.ended else []
    return "; ".join(told)


def _table(choice: ChoiceTrace) -> Table:
    from blockserve.router.traces.parts import parts_of

    several = len(choice.paths) > 1
    runs = [step.run for path in choice.paths for step in path.steps]
    last = last_position((run.first, len(run)) for run in runs)
    table = Table(COLUMNS)
    for part in parts_of(choice):
        table.add(*_cells(part, choice, several, last))
    table.add("total", *[""] * 7, _ms(choice.seconds), "100%")
    return table


def _cells(part: Part, choice: ChoiceTrace, several: bool, last: int) -> list[str]:
    path = f"path {part.epoch}: " if several and part.epoch is not None else ""
    share = f"{round(100 * part.seconds / choice.seconds)}%" if choice.seconds else ""
    time = [_ms(part.seconds), share]
    if part.step is None:
        per_token = _ms(part.per_token) if part.per_token else ""
        return [f"{path}{_name(part, choice)}", "", "", "", "", per_token, "", "", *time]
    run, times = part.step.run, part.step.times
    row = [f"{path}{part.step.name or 'this process'}", describe_run(run.first, len(run), last)]
    if times is None:
        return [*row, "unknown", "", "", "", "", "", "", ""]
    return [*row, *_measured(times), *time]


def _name(part: Part, choice: ChoiceTrace) -> str:
    """What a part is called; hops with what small calls measure of one of them."""
    if part.kind != "hops":
        return str(part.kind)
    path = next(path for path in choice.paths if path.epoch == part.epoch)
    known = [step.hop_seconds for step in path.steps if step.hop_seconds]
    measured = f", {_ms(sum(known) / len(known))} each by probes" if known else ""
    return f"hops ({len(path.steps)} a token{measured})"


def _measured(times: SpanTimes) -> list[str]:
    prompt, decode = times.prompt, times.decode
    cached = f" ({times.cached} cached)" if times.cached else ""
    return [
        f"{prompt.tokens}{cached} + {decode.tokens}",
        _ms(prompt.seconds),
        _ms(decode.seconds),
        _ms(decode.seconds_per_token) if decode.tokens else "-",
        _ms(max(prompt.longest, decode.longest)),
        _ms(prompt.waited + decode.waited),
    ]


def _ms(seconds: float) -> str:
    # What rounds to nothing has no sign.
    return f"{round(1000 * seconds, 2) or 0.0:.2f} ms" if seconds < 0.1 else f"{1000 * seconds:.0f} ms"
