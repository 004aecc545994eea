"""Checks of bias, penalties, the least length and the number of choices. Pure; `plan` calls them."""

from __future__ import annotations

from blockserve.common.api.calls import GenerateCall, SamplingWishes
from blockserve.common.api.engine import SamplingParams
from blockserve.common.errors import ResumeError, SamplingError
from blockserve.router.limits import RouterConfig


def check_logit_edits(wishes: SamplingWishes, limits: RouterConfig) -> None:
    """Refuse penalties and biases that no variant could take; NaN is among them.

    Raises:
        SamplingError: naming the field.
    """
    most = limits.max_repetition_penalty
    penalty = wishes.repetition_penalty
    if penalty is not None and not 1 / most <= penalty <= most:
        raise SamplingError("sampling.repetition_penalty", f"{penalty:g} is outside {1 / most:g} to {most:g}")
    for name in ("presence_penalty", "frequency_penalty"):
        value: float = getattr(wishes, name)
        if not abs(value) <= limits.max_penalty:
            raise SamplingError(
                f"sampling.{name}", f"{value:g} is outside {-limits.max_penalty:g} to {limits.max_penalty:g}"
            )
    if len(wishes.logit_bias) > limits.max_logit_bias_tokens:
        raise SamplingError(
            "sampling.logit_bias",
            f"{len(wishes.logit_bias)} tokens, at most {limits.max_logit_bias_tokens}",
        )
    for token, bias in wishes.logit_bias:
        if not abs(bias) <= limits.max_logit_bias:
            raise SamplingError(
                f"sampling.logit_bias[{token}]",
                f"{bias:g} is outside {-limits.max_logit_bias:g} to {limits.max_logit_bias:g}",
            )


def check_choices(call: GenerateCall, limits: RouterConfig) -> None:
    """Refuse no choices, too many, and resuming that does not say where each goes on.

    Raises:
        SamplingError: `sampling.n` is out of range.
        ResumeError: `resume_from` for several choices, or not one of `resume_choices` for each.
    """
    count = call.num_choices
    if not 1 <= count <= limits.max_choices:
        raise SamplingError("sampling.n", f"{count} is outside 1 to {limits.max_choices}")
    if call.resume_from and (count > 1 or call.resume_choices):
        raise ResumeError(
            "resume_from is for an answer of one choice",
            hint="Send resume_choices alone: for each choice, the number of tokens already received.",
            field="resume_from",
        )
    if call.resume_choices and len(call.resume_choices) != count:
        raise ResumeError(
            f"resume_choices has {len(call.resume_choices)} entries for {count} choices",
            hint="Send for each choice the number of tokens already received.",
            field="resume_choices",
        )


def check_resolved(call: GenerateCall, sampling: SamplingParams, *, vocab: int, max_tokens: int) -> None:
    """Refuse what does not fit the variant's vocabulary, its defaults or the length of the answer.

    Raises:
        SamplingError: naming the field.
    """
    for token, _ in sampling.logit_bias:
        if token >= vocab:
            raise SamplingError(
                f"sampling.logit_bias[{token}]", f"token {token} is outside the vocabulary of {vocab}"
            )
    if call.stopping.min_tokens > max_tokens:
        raise SamplingError(
            "stopping.min_tokens",
            f"{call.stopping.min_tokens} is more than the {max_tokens} tokens that the answer can have",
        )
    if call.num_choices > 1 and sampling.is_greedy:
        raise SamplingError("sampling.n", "greedy choices would all be the same; set a temperature above 0")


def check_held(held: frozenset[int], min_tokens: int, vocab: int) -> None:
    """Refuse a least length that leaves no token to choose.

    Raises:
        SamplingError: every token of the vocabulary would be held back.
    """
    if min_tokens and len(held) >= vocab:
        raise SamplingError(
            "stopping.min_tokens", f"end and stop tokens are all {vocab} tokens of the vocabulary"
        )
