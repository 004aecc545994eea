"""What the calls of a client have in common."""

from __future__ import annotations

from typing import Any

import grpc

from blockserve.common.wire.errors import from_rpc_error


class Calls:
    """Credentials and deadline of every call, and typed errors in place of gRPC's.

    Attributes:
        metadata: what each call carries.
        timeout: seconds for a call that gives none; None for no deadline.
    """

    def __init__(self, metadata: tuple[tuple[str, str], ...], timeout: float | None) -> None:
        self.metadata = metadata
        self.timeout = timeout

    async def call(self, method: Any, request: Any) -> Any:
        """Call a stub's method that has one request and one answer.

        Raises:
            BlockzooError: as the server raised it, or UnavailableError and its like.
        """
        try:
            return await method(request, metadata=self.metadata, timeout=self.timeout)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
