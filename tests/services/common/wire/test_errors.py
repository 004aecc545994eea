"""Errors on the wire: each class mapped on purpose, details that survive the trip, nothing lost."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

import blockserve
import blockzoo
from blockproto.v1 import errors_pb2
from blockserve.common import errors as serve_errors
from blockserve.common.errors import (
    BreakCause,
    PathBrokenError,
    QueueFullError,
    RemoteError,
    SamplingError,
    ServerStoppingError,
)
from blockserve.common.wire.errors import (
    DETAILS_KEY,
    STATUS,
    all_errors,
    from_rpc_error,
    pack,
    status_code,
    to_status,
    unpack,
)
from blockzoo import errors as zoo_errors
from blockzoo.errors import BlockzooError, UnsupportedArchitectureError, VariantNotFoundError


def test_every_error_class_is_mapped_on_purpose() -> None:
    for package in (blockzoo, blockserve):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if "errors" in module.name:
                importlib.import_module(module.name)
    ours = {cls for cls in all_errors() if cls.__module__.startswith(("blockzoo.", "blockserve."))}
    assert ours == set(STATUS)


def test_reasons_tell_the_classes_apart() -> None:
    reasons = [cls.reason for cls in STATUS]
    assert len(set(reasons)) == len(reasons)
    assert all(reason.isupper() for reason in reasons)


def test_a_class_made_later_takes_its_parents_status() -> None:
    class LateError(zoo_errors.CorruptBlobError):
        """Not in the table."""

    assert status_code(LateError("x")) is grpc.StatusCode.DATA_LOSS


class FailedCall(grpc.RpcError):
    """What a client sees of a status."""

    def __init__(self, code: grpc.StatusCode, details: str, packed: bytes | None = None) -> None:
        self._values = code, details, packed

    def code(self) -> grpc.StatusCode:
        return self._values[0]

    def details(self) -> str:
        return self._values[1]

    def trailing_metadata(self) -> list[tuple[str, Any]]:
        return [] if self._values[2] is None else [("other", "x"), (DETAILS_KEY, self._values[2])]


def round_trip(error: BlockzooError) -> BlockzooError:
    status = to_status(error)
    return from_rpc_error(FailedCall(status_code(error), status.message, status.SerializeToString()))


def make(cls: type[BlockzooError]) -> BlockzooError:
    if cls is SamplingError:
        return SamplingError("sampling.top_p", "7 is too much")
    if cls is VariantNotFoundError:
        return VariantNotFoundError("kvj", ["kjv", "kiv"])
    if cls is UnsupportedArchitectureError:
        return UnsupportedArchitectureError("Mamba", ["Llama", "Qwen2"])
    if cls is zoo_errors.CurrentVersionError:
        return zoo_errors.CurrentVersionError("kjv", 3)
    return cls("what happened", hint="what to do", chain="c0ffee")


@pytest.mark.parametrize("cls", sorted(STATUS, key=lambda cls: cls.__name__))
def test_an_error_comes_back_as_itself(cls: type[BlockzooError]) -> None:
    error, back = make(cls), round_trip(make(cls))
    if cls is BlockzooError or issubclass(cls, RemoteError):
        assert type(back) is RemoteError
        assert back.metadata["remote_reason"] == cls.reason
    else:
        assert type(back) is cls
        assert back.metadata.items() >= error.metadata.items()
    assert str(back) == str(error)
    assert back.hint == error.hint


def test_what_classes_carry_beside_metadata_comes_back() -> None:
    assert round_trip(QueueFullError("full", retry_after=2.5)).retry_after == 2.5
    assert round_trip(ServerStoppingError("stopping", retry_after=0.5)).retry_after == 0.5
    assert round_trip(make(SamplingError)).field == "sampling.top_p"
    assert round_trip(make(VariantNotFoundError)).suggestions == ("kjv", "kiv")
    assert round_trip(make(UnsupportedArchitectureError)).supported == ("Llama", "Qwen2")


@pytest.mark.parametrize("cause", BreakCause)
@pytest.mark.parametrize(("worker", "seen_by"), [("b", "a"), ("b", ""), ("", "")])
def test_a_broken_path_names_its_cause_and_workers(cause: BreakCause, worker: str, seen_by: str) -> None:
    error = PathBrokenError(
        "gone", cause=cause, worker=worker, seen_by=seen_by, retry_after=1.5, hint="wait", chain="c0ffee"
    )
    back = round_trip(error)
    assert isinstance(back, PathBrokenError)
    assert (back.cause, back.worker, back.seen_by, back.retry_after) == (cause, worker, seen_by, 1.5)
    assert (back.hint, back.metadata) == ("wait", error.metadata)


def test_a_broken_path_keeps_its_keys_on_the_wire() -> None:
    error = PathBrokenError("gone", cause=BreakCause.DRAINING, worker="b", seen_by="a")
    assert error.metadata == {"cause": "draining", "worker": "b", "seen_by": "a"}
    assert PathBrokenError("gone").metadata == {"cause": "lost"}
    assert {cause.value for cause in BreakCause} == {"lost", "draining", "replaced", "superseded"}


@pytest.mark.parametrize("said", [{}, {"cause": "eaten"}])
def test_a_cause_that_is_missing_or_unknown_means_lost(said: dict[str, str]) -> None:
    error = PathBrokenError("gone", worker="b")
    error.metadata = {"worker": "b", **said}
    back = round_trip(error)
    assert isinstance(back, PathBrokenError)
    assert (back.cause, back.worker, back.seen_by) == (BreakCause.LOST, "b", "")


def details(error: BlockzooError, kind: Any) -> Any:
    for packed in to_status(error).details:
        if packed.Is(kind.DESCRIPTOR):
            message = kind()
            packed.Unpack(message)
            return message
    return None


def test_the_details_are_the_standard_ones() -> None:
    info = details(make(VariantNotFoundError), error_details_pb2.ErrorInfo)
    assert (info.domain, info.reason) == ("blockzoo", "VARIANT_NOT_FOUND")
    assert info.metadata["suggestions"] == "kjv, kiv"
    retry = details(QueueFullError("full", retry_after=1.5), error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 1500
    request = details(make(SamplingError), error_details_pb2.BadRequest)
    assert [violation.field for violation in request.field_violations] == ["sampling.top_p"]


@pytest.mark.parametrize(
    ("ours", "original"),
    [
        (errors_pb2.Status, status_pb2.Status),
        (errors_pb2.ErrorInfo, error_details_pb2.ErrorInfo),
        (errors_pb2.RetryInfo, error_details_pb2.RetryInfo),
        (errors_pb2.BadRequest, error_details_pb2.BadRequest),
        (errors_pb2.BadRequest.FieldViolation, error_details_pb2.BadRequest.FieldViolation),
    ],
)
def test_our_messages_are_those_of_google_rpc(ours: Any, original: Any) -> None:
    theirs = {
        (field.number, field.name): (field.type, field.is_repeated) for field in original.DESCRIPTOR.fields
    }
    for field in ours.DESCRIPTOR.fields:
        assert theirs[field.number, field.name] == (field.type, field.is_repeated)


def test_what_is_packed_goes_by_the_name_of_the_original() -> None:
    packed = pack(errors_pb2.ErrorInfo(reason="QUEUE_FULL"))
    assert packed.type_url == "type.googleapis.com/google.rpc.ErrorInfo"
    assert unpack(packed, errors_pb2.ErrorInfo) == errors_pb2.ErrorInfo(reason="QUEUE_FULL")
    assert unpack(packed, errors_pb2.RetryInfo) is None


def test_no_retry_is_promised_where_it_cannot_help() -> None:
    assert details(serve_errors.KvCapacityError("too big"), error_details_pb2.RetryInfo) is None


def test_a_status_fits_the_header_frame_whatever_a_caller_sent() -> None:
    names = ["n" * 4000] * 500
    error = VariantNotFoundError("x" * 1_000_000, names)
    for i in range(100):
        error.metadata = {**error.metadata, f"key{i}": "v" * 5000}
    assert to_status(error).ByteSize() < 7000


def test_metadata_cannot_collide_with_python_names() -> None:
    error = BlockzooError("odd")
    error.metadata = {"self": "a", "message": "b"}
    status = to_status(error)
    back = from_rpc_error(FailedCall(grpc.StatusCode.INTERNAL, "odd", status.SerializeToString()))
    assert back.metadata["self"] == "a"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, serve_errors.UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, serve_errors.DeadlineExceededError),
        (grpc.StatusCode.UNAUTHENTICATED, serve_errors.UnauthenticatedError),
        (grpc.StatusCode.UNIMPLEMENTED, RemoteError),
    ],
)
def test_statuses_that_carry_no_details_are_typed_too(
    code: grpc.StatusCode, kind: type[BlockzooError]
) -> None:
    assert type(from_rpc_error(FailedCall(code, "gone"))) is kind
    foreign = status_pb2.Status(message="of another program")
    foreign.details.add().Pack(error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="elsewhere"))
    assert type(from_rpc_error(FailedCall(code, "gone", foreign.SerializeToString()))) is kind
