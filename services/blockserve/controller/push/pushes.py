"""The pushes that a server has open."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable

from blockserve.common.errors import PushCapacityError, PushNotFoundError
from blockserve.controller.push.budget import RETRY_AFTER_SECONDS, Budget
from blockserve.controller.push.limits import ControllerConfig
from blockserve.controller.push.push import Push
from blockzoo.store.zoo_store import ZooStore

MAX_PURPOSE_CHARS = 200


class Pushes:
    """Pushes by id; safe from several threads. What is not heard of for a while is given up."""

    def __init__(
        self, store: ZooStore, config: ControllerConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._config = config
        self._clock = clock
        self._budget = Budget(config.max_unstored_bytes)
        self._lock = threading.Lock()
        self._open: dict[str, tuple[Push, float]] = {}

    def begin(self, purpose: str) -> tuple[str, Push]:
        """Begin a push; returns its id too.

        Raises:
            PushCapacityError: as many are open as may be.
            FormatVersionError: this version must not write into the zoo.
        """
        self.drop_idle()
        with self._lock:
            if len(self._open) >= self._config.max_pushes:
                raise PushCapacityError(
                    f"{len(self._open)} pushes are open, the maximum of this server",
                    retry_after=RETRY_AFTER_SECONDS,
                )
            push = Push(self._store, f"push: {purpose[:MAX_PURPOSE_CHARS]}", self._config, self._budget)
            push_id = uuid.uuid4().hex
            self._open[push_id] = push, self._clock()
        return push_id, push

    def get(self, push_id: str) -> Push:
        """An open push, or one that was committed a while ago; raises PushNotFoundError."""
        with self._lock:
            found = self._open.get(push_id)
            if found is None:
                raise PushNotFoundError(
                    "this server knows no such push",
                    hint="Begin another push; stored data is not sent again.",
                )
            self._open[push_id] = found[0], self._clock()
            return found[0]

    def end(self, push_id: str) -> None:
        """Give a push up; one that is not known has ended already."""
        with self._lock:
            found = self._open.pop(push_id, None)
        if found is not None:
            found[0].close()

    def close(self) -> None:
        """Give all of them up."""
        for push_id in list(self._open):
            self.end(push_id)

    def drop_idle(self) -> None:
        """Give up those that nothing was heard of for too long, and that nothing is at work for."""
        deadline = self._clock() - self._config.push_idle_seconds
        with self._lock:
            idle = [
                push_id
                for push_id, (push, heard) in self._open.items()
                if heard < deadline and not push.is_busy
            ]
        for push_id in idle:
            self.end(push_id)
