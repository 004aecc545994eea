"""One call's time, as its router tells it. Frozen values; `router.traces.parts` does the sums."""

from __future__ import annotations

from dataclasses import dataclass

from blockserve.common.api.spans import PathTrace


@dataclass(frozen=True, slots=True)
class ChoiceTrace:
    """One of the answers to a call; times are seconds since the call came in.

    Attributes:
        choice: which of several.
        engine_request_id: as the workers' logs name it.
        begun: it was given to the engine.
        first_token: its first token came; None before that.
        seconds: its end, or now.
        tokens: output tokens so far.
        paths: where it ran, in order.
    """

    choice: int
    engine_request_id: str
    begun: float
    first_token: float | None
    seconds: float
    tokens: int
    paths: tuple[PathTrace, ...] = ()


@dataclass(frozen=True, slots=True)
class CallTrace:
    """One Generate call.

    Attributes:
        request_id: as its caller named it.
        model: name of the variant, as asked for until it was found.
        version: of the variant; 0 until it was found.
        prompt_tokens: length of the prompt; 0 until it was made into token ids.
        outcome: "running", "finished", "cancelled", or the reason of its error.
        resolving: seconds in which the variant was looked up.
        tokenising: seconds in which the prompt became token ids.
        seconds: from its arrival to its end, or until now.
        age: seconds since its arrival.
        choices: its answers.
    """

    request_id: str
    model: str
    version: int
    prompt_tokens: int
    outcome: str
    resolving: float
    tokenising: float
    seconds: float
    age: float
    choices: tuple[ChoiceTrace, ...] = ()
