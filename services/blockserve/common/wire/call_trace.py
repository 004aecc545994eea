"""Traces of calls to messages of `blockproto.v1` and back. Pure."""

from __future__ import annotations

from blockproto.v1 import admin_pb2, trace_pb2
from blockserve.common.api.call_trace import CallTrace, ChoiceTrace
from blockserve.common.api.cluster import Run, WorkerId
from blockserve.common.api.spans import PathTrace, StepTrace
from blockserve.common.api.status import RunningPath, RunningStep
from blockserve.common.wire.spans import times_from_message, times_to_message


def call_to_message(call: CallTrace) -> trace_pb2.CallTrace:
    """A call for the wire."""
    return trace_pb2.CallTrace(
        request_id=call.request_id,
        model=call.model,
        version=call.version,
        prompt_tokens=call.prompt_tokens,
        outcome=call.outcome,
        resolving_seconds=call.resolving,
        tokenising_seconds=call.tokenising,
        seconds=call.seconds,
        age_seconds=call.age,
        choices=[_choice_to_message(choice) for choice in call.choices],
    )


def call_from_message(message: trace_pb2.CallTrace) -> CallTrace:
    """The inverse of `call_to_message`."""
    return CallTrace(
        request_id=message.request_id,
        model=message.model,
        version=message.version,
        prompt_tokens=message.prompt_tokens,
        outcome=message.outcome,
        resolving=message.resolving_seconds,
        tokenising=message.tokenising_seconds,
        seconds=message.seconds,
        age=message.age_seconds,
        choices=tuple(_choice_from_message(choice) for choice in message.choices),
    )


def running_path_to_message(path: RunningPath) -> admin_pb2.RunningPath:
    """A path of running requests for the wire."""
    steps = [
        admin_pb2.RunningStep(
            worker_id=step.worker_id,
            name=step.name,
            first_position=step.first_position,
            num_blocks=step.num_blocks,
        )
        for step in path.steps
    ]
    return admin_pb2.RunningPath(steps=steps, requests=path.requests)


def running_path_from_message(message: admin_pb2.RunningPath) -> RunningPath:
    """The inverse of `running_path_to_message`."""
    steps = tuple(
        RunningStep(step.worker_id, step.name, step.first_position, step.num_blocks) for step in message.steps
    )
    return RunningPath(steps, message.requests)


def _choice_to_message(choice: ChoiceTrace) -> trace_pb2.ChoiceTrace:
    return trace_pb2.ChoiceTrace(
        choice=choice.choice,
        engine_request_id=choice.engine_request_id,
        begun_seconds=choice.begun,
        first_token_seconds=choice.first_token,
        seconds=choice.seconds,
        tokens=choice.tokens,
        paths=[_path_to_message(path) for path in choice.paths],
    )


def _choice_from_message(message: trace_pb2.ChoiceTrace) -> ChoiceTrace:
    return ChoiceTrace(
        choice=message.choice,
        engine_request_id=message.engine_request_id,
        begun=message.begun_seconds,
        first_token=message.first_token_seconds if message.HasField("first_token_seconds") else None,
        seconds=message.seconds,
        tokens=message.tokens,
        paths=tuple(_path_from_message(path) for path in message.paths),
    )


def _path_to_message(path: PathTrace) -> trace_pb2.PathTrace:
    return trace_pb2.PathTrace(
        epoch=path.epoch,
        steps=[_step_to_message(step) for step in path.steps],
        choosing_seconds=path.choosing,
        moving_seconds=path.moving,
        moved=path.moved,
        running_seconds=path.running,
        ended=path.ended,
    )


def _path_from_message(message: trace_pb2.PathTrace) -> PathTrace:
    return PathTrace(
        epoch=message.epoch,
        steps=tuple(_step_from_message(step) for step in message.steps),
        choosing=message.choosing_seconds,
        moving=message.moving_seconds,
        moved=message.moved,
        running=message.running_seconds,
        ended=message.ended,
    )


def _step_to_message(step: StepTrace) -> trace_pb2.StepTrace:
    return trace_pb2.StepTrace(
        worker_id=step.worker,
        name=step.name,
        first=step.run.first,
        end=step.run.end,
        times=None if step.times is None else times_to_message(step.times),
        hop_seconds=step.hop_seconds,
    )


def _step_from_message(message: trace_pb2.StepTrace) -> StepTrace:
    return StepTrace(
        worker=WorkerId(message.worker_id),
        name=message.name,
        run=Run(message.first, message.end),
        times=times_from_message(message.times) if message.HasField("times") else None,
        hop_seconds=message.hop_seconds,
    )
