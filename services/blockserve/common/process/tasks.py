"""Ending background tasks."""

from __future__ import annotations

import asyncio
from typing import Any

AGAIN_SECONDS = 0.5


async def end(task: asyncio.Task[Any] | None) -> None:
    """Cancel a task and wait until it has ended; what it raised is dropped.

    It is cancelled again for as long as it goes on: a library may lose a cancellation that comes at the same
    moment as a timeout or a reply.
    """
    while task is not None and not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=AGAIN_SECONDS)
    if task is not None and not task.cancelled():
        task.exception()
