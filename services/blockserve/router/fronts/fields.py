"""What callers of the gRPC services call the values of a call: paths of protobuf fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from blockserve.common.api.calls import CallField
from blockserve.common.errors import SamplingError
from blockzoo.errors import InvalidInputError

PROTOBUF_PATHS: Mapping[CallField, str] = {
    CallField.PROMPT: "prompt",
    CallField.TOKEN_IDS: "token_ids.ids",
    CallField.MESSAGES: "chat.messages",
    CallField.TEMPERATURE: "sampling.temperature",
    CallField.TOP_K: "sampling.top_k",
    CallField.TOP_P: "sampling.top_p",
    CallField.MIN_P: "sampling.min_p",
    CallField.SEED: "sampling.seed",
    CallField.REPETITION_PENALTY: "sampling.repetition_penalty",
    CallField.PRESENCE_PENALTY: "sampling.presence_penalty",
    CallField.FREQUENCY_PENALTY: "sampling.frequency_penalty",
    CallField.LOGIT_BIAS: "sampling.logit_bias",
    CallField.N: "sampling.n",
    CallField.MAX_TOKENS: "stopping.max_tokens",
    CallField.MIN_TOKENS: "stopping.min_tokens",
    CallField.STOP: "stopping.stop",
    CallField.STOP_TOKEN_IDS: "stopping.stop_token_ids",
    CallField.LOGPROBS: "response.logprobs",
    CallField.RESUME_FROM: "resume_from",
    CallField.RESUME_CHOICES: "resume_choices",
    CallField.RESUME_CHAIN: "resume_chain",
}
"""Paths inside GenerateRequest; a test checks that no value is missing and that every path exists."""


@contextmanager
def named_by(paths: Mapping[CallField, str]) -> Iterator[None]:
    """Let errors that leave the block name the call's values in a protocol's own words.

    The name changes in the error's field and at the beginning of its message, where messages have it.

    Args:
        paths: the protocol's name of each value.
    """
    try:
        yield
    except InvalidInputError as error:
        if field := error.metadata.get("field"):
            _rename(error, field, _spell(field, paths))
        raise


def _spell(field: str, paths: Mapping[CallField, str]) -> str:
    """The protocol's name of a value or of one entry of it; what is no value of a call keeps its name."""
    name, bracket, key = field.partition("[")
    try:
        return f"{paths[CallField(name)]}{bracket}{key}"
    except ValueError:
        return field


def _rename(error: InvalidInputError, field: str, spelled: str) -> None:
    message = str(error)
    if message.startswith(f"{field}: "):
        error.args = (spelled + message[len(field) :],)
    error.metadata = {**error.metadata, "field": spelled}
    if isinstance(error, SamplingError):
        error.field = spelled
