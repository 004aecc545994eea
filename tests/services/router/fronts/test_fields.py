"""The gRPC front's words for the values of a call: complete, true, and put where errors name a value."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from google.protobuf.descriptor import Descriptor

from blockproto.v1 import inference_pb2
from blockserve.common.api.calls import CallField
from blockserve.common.errors import PromptError, ResumeError, SamplingError
from blockserve.router.fronts.fields import PROTOBUF_PATHS, named_by
from blockzoo.errors import BlockzooError, InvalidInputError

REQUEST = inference_pb2.GenerateRequest.DESCRIPTOR


def translated(error: BlockzooError) -> BlockzooError:
    with pytest.raises(type(error)) as caught, named_by(PROTOBUF_PATHS):
        raise error
    assert caught.value is error
    return error


def names(message: Descriptor, path: Iterable[str]) -> list[str]:
    """The fields, or groups of fields, that a path goes through."""
    found: list[str] = []
    for name in path:
        assert name in message.fields_by_name or name in message.oneofs_by_name, name
        found.append(name)
        if name in message.fields_by_name:
            message = message.fields_by_name[name].message_type
    return found


def test_every_value_that_an_error_can_name_has_a_path() -> None:
    assert set(PROTOBUF_PATHS) == set(CallField)
    assert len(set(PROTOBUF_PATHS.values())) == len(PROTOBUF_PATHS)


@pytest.mark.parametrize("path", PROTOBUF_PATHS.values())
def test_every_path_leads_to_a_field_of_the_request(path: str) -> None:
    assert ".".join(names(REQUEST, path.split("."))) == path


@pytest.mark.parametrize("field", CallField)
def test_field_and_message_name_the_path(field: CallField) -> None:
    error = translated(SamplingError(field, "7 is too much"))
    assert isinstance(error, SamplingError)
    assert str(error) == f"{PROTOBUF_PATHS[field]}: 7 is too much"
    assert error.field == error.metadata["field"] == PROTOBUF_PATHS[field]


def test_an_entry_keeps_its_number() -> None:
    error = translated(SamplingError(CallField.STOP.at(2), "too long"))
    assert (str(error), error.metadata["field"]) == ("stopping.stop[2]: too long", "stopping.stop[2]")
    error = translated(PromptError("token_ids[1]: outside", field=CallField.TOKEN_IDS.at(1)))
    assert (str(error), error.metadata["field"]) == ("token_ids.ids[1]: outside", "token_ids.ids[1]")


def test_a_message_that_does_not_begin_with_the_name_stays() -> None:
    error = translated(PromptError("no messages: none", field=CallField.N, turns=0))
    assert str(error) == "no messages: none"
    assert error.metadata == {"field": "sampling.n", "turns": "0"}
    error = translated(ResumeError("resume_from needs the seed", hint="send it", field=CallField.SEED))
    assert (str(error), error.hint) == ("resume_from needs the seed", "send it")
    assert error.metadata["field"] == "sampling.seed"


@pytest.mark.parametrize(
    "error",
    [
        InvalidInputError("replicas: too many", field="replicas"),
        InvalidInputError("no field at all"),
        BlockzooError("n: no input", field="n"),
    ],
)
def test_other_errors_pass_as_they_are(error: BlockzooError) -> None:
    before = str(error), dict(error.metadata)
    translated(error)
    assert (str(error), error.metadata) == before


def test_without_a_front_the_name_is_that_of_python() -> None:
    error = SamplingError(CallField.STOP.at(2), "too long")
    assert (str(error), error.field) == ("stop[2]: too long", "stop[2]")
