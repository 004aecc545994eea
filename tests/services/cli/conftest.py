"""Command lines against a real tiny zoo, and against a real gRPC server over a scripted engine."""

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blockserve.cli import main
from blockzoo import Zoo
from support.cuttable import Cut, CuttableWire
from support.edge import Rig, serving
from support.folders import config, tensors, write_adapter, write_checkpoint


@dataclass(frozen=True)
class Outcome:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON value and nothing else."""
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        """The error that `--json` prints on standard error."""
        return json.loads(self.err)["error"]


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in this process; wide, so that help texts do not fold."""
    # A service that was about to start has set up logging to a standard error that ends with the test.
    monkeypatch.setattr(logging.getLogger(), "handlers", logging.getLogger().handlers[:])
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")  # `main` would set it for the whole test process
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")

    def run(*words: object) -> Outcome:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Folders to register: base, tuned (the last layer differs), adapter."""
    place = tmp_path / "folders"
    values = config()
    items = tensors(values)
    write_checkpoint(place / "base", values, items)
    other = tensors(values, seed=1)
    tuned = {name: other[name] if ".layers.2." in name else item for name, item in items.items()}
    write_checkpoint(place / "tuned", values, tuned)
    write_adapter(place / "adapter")
    return place


@pytest.fixture
def zoo(tmp_path: Path, folders: Path, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    """A zoo with `base`, `tuned` and the adapter `bot`, named by BLOCKZOO_ZOO."""
    monkeypatch.setenv("BLOCKZOO_ZOO", str(tmp_path / "zoo"))
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(folders / "base", name="base")
    zoo.register(folders / "tuned", name="tuned")
    zoo.register(folders / "adapter", name="bot", base="base")
    return zoo


class Served:
    """A server in a thread of its own, so that the commands under test can block."""

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self.ready = threading.Event()
        self.rig: Rig
        self.wire: CuttableWire
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))
        self._thread.start()
        assert self.ready.wait(60)

    async def _serve(self) -> None:
        async with serving(**self._settings) as rig:
            self.rig = rig
            self.wire = await CuttableWire(lambda: int(rig.server.address.rpartition(":")[2])).start()
            self.ready.set()
            await self._stop.wait()
            await self.wire.close()

    @contextmanager
    def gone(self) -> Iterator[None]:
        """What is connected to `wire` loses the server meanwhile, and finds nobody at its address."""
        cut = self.wire.cut(Cut.REFUSED)
        self._wait_for(cut.__enter__)
        yield
        self._wait_for(lambda: cut.__exit__(None, None, None))

    def _wait_for(self, act: Callable[[], object]) -> None:
        async def run() -> None:
            act()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(60)

    def call(self, act: Callable[[], None]) -> None:
        """Run something in the server's event loop."""
        self._loop.call_soon_threadsafe(act)

    def close(self) -> None:
        """Stop the server."""
        self.call(self._stop.set)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server with the variant `tale`, named by BLOCKZOO_SERVER."""
    served = Served()
    monkeypatch.setenv("BLOCKZOO_SERVER", served.rig.server.address)
    yield served
    served.close()


@pytest.fixture
def serve_with() -> Iterator[Callable[..., Served]]:
    """Start servers with settings of their own; the same as `served` otherwise."""
    started: list[Served] = []

    def start(**settings: Any) -> Served:
        started.append(Served(**settings))
        return started[-1]

    yield start
    for one in started:
        one.close()
