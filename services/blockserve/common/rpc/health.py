"""grpc.health.v1 that tells the truth: serving means that work moves forward."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from blockserve.common.api.engine import EngineReport

log = logging.getLogger(__name__)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def makes_progress(report: EngineReport, stall_seconds: float) -> bool:
    """Whether the engine is idle, or has finished a pass within the bound."""
    pending = report.waiting_requests + report.running_requests
    return not pending or report.seconds_since_progress <= stall_seconds


class HealthReporter:
    """Keeps the health of the whole server and of each service."""

    def __init__(self, services: tuple[str, ...]) -> None:
        self._services = ("", *services)
        self._servicer: Any = health.aio.HealthServicer()
        self._status = NOT_SERVING
        self._watcher: asyncio.Task[None] | None = None

    @property
    def is_serving(self) -> bool:
        """What callers are told now."""
        return bool(self._status == SERVING)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Answer `grpc.health.v1.Health` on the server."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set(self, status: int) -> None:
        """Tell the same of everything."""
        self._status = status
        for service in self._services:
            await self._servicer.set(service, status)

    def watch(self, report: Callable[[], EngineReport], *, stall_seconds: float, every: float) -> None:
        """From now on say SERVING while the engine makes progress, NOT_SERVING while it hangs."""
        self._watcher = asyncio.create_task(self._watch(report, stall_seconds, every))

    async def stop(self) -> None:
        """Say NOT_SERVING for good, to those who watch as well."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        self._status = NOT_SERVING
        await self._servicer.enter_graceful_shutdown()

    async def _watch(self, report: Callable[[], EngineReport], stall_seconds: float, every: float) -> None:
        while True:
            await self._look(report(), stall_seconds)
            await asyncio.sleep(every)

    async def _look(self, report: EngineReport, stall_seconds: float) -> None:
        status = SERVING if makes_progress(report, stall_seconds) else NOT_SERVING
        if status == self._status:
            return
        if status == NOT_SERVING:
            log.error(
                "engine makes no progress seconds=%.0f running=%d waiting=%d",
                report.seconds_since_progress,
                report.running_requests,
                report.waiting_requests,
            )
        await self.set(status)
