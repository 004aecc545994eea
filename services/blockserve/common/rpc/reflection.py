"""gRPC reflection under both of its names: clients of today ask for v1, older ones for v1alpha.

The messages of both are the same, byte for byte; the library that we use knows v1alpha only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool

ALPHA = "grpc.reflection.v1alpha"
STABLE = "grpc.reflection.v1"
SERVICE = f"{STABLE}.ServerReflection"


def enable_reflection(server: grpc.aio.Server, services: Sequence[str]) -> None:
    """Answer gRPC reflection for these services, for health, and for reflection itself."""
    from grpc_health.v1 import health
    from grpc_reflection.v1alpha import reflection, reflection_pb2

    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME, SERVICE)
    reflection.enable_server_reflection(names, server)
    _describe_stable(reflection_pb2.DESCRIPTOR)
    method: Any = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(SERVICE, {"ServerReflectionInfo": method})
    server.add_generic_rpc_handlers((handler,))


def _describe_stable(alpha: Any) -> None:
    """Let the pool know the service under its later name, so that reflection can describe itself."""
    pool = descriptor_pool.Default()
    try:
        pool.FindFileContainingSymbol(SERVICE)
    except KeyError:
        proto = descriptor_pb2.FileDescriptorProto()
        alpha.CopyToProto(proto)
        _rename(proto)
        pool.AddSerializedFile(proto.SerializeToString())


def _rename(proto: descriptor_pb2.FileDescriptorProto) -> None:
    proto.name, proto.package = proto.name.replace("v1alpha", "v1"), STABLE
    for message in proto.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(ALPHA, STABLE)
    for service in proto.service:
        for method in service.method:
            method.input_type = method.input_type.replace(ALPHA, STABLE)
            method.output_type = method.output_type.replace(ALPHA, STABLE)
