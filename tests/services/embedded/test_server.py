"""Starting and stopping the embedded server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import Any

import pytest

from blockserve.client.aio import AsyncClient
from blockserve.embedded.server import EmbeddedServer
from blockserve.embedded.settings import EmbeddedSettings
from blockserve.embedded.startup import Parts, Timeline, process_age
from blockzoo.errors import CorruptBlobError, ZooNotFoundError
from support.edge import FakeZoo, ScriptedEngine, async_test, fake_parts, serving, variant_files


@async_test
async def test_preload_brings_variants_in_before_the_first_request() -> None:
    zoo = FakeZoo()
    for name in ("tale", "song", "poem"):
        zoo.add(name)
    async with serving(zoo, preload=("tale", "song")) as rig:
        assert rig.engine.loaded == {"chain-of-tale-1", "chain-of-song-1"}
        assert "tokenizer.json" in zoo.files_read
    async with serving(zoo, engine=ScriptedEngine(), preload=("all",)) as rig:
        assert len(rig.engine.loaded) == 3
        assert not rig.engine.pinned


@async_test
async def test_pinned_variants_are_read_first_and_stay() -> None:
    zoo = FakeZoo()
    for name in ("tale", "song", "poem"):
        zoo.add(name)
    for preload, loaded in (((), 1), (("all",), 3), (("tale", "poem"), 2)):
        async with serving(zoo, engine=ScriptedEngine(), pin=("tale",), preload=preload) as rig:
            assert rig.engine.pinned == {"chain-of-tale-1"}
            assert len(rig.engine.loaded) == loaded == rig.engine.num_loads


@async_test
async def test_one_variant_that_cannot_be_preloaded_does_not_keep_the_others_from_serving(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Picky(ScriptedEngine):
        async def load(self, chain: Any) -> None:
            if "song" in chain:
                raise CorruptBlobError("blob c0ffee is damaged")
            await super().load(chain)

    zoo = FakeZoo()
    zoo.add("song", files=variant_files(tokenizer_json=b"broken"))
    zoo.add("tale")
    async with serving(zoo, Picky(), preload=("all",)) as rig:
        assert (await rig.client.generate("tale", "x", max_tokens=1).result()).token_ids
        assert "variant=song" in caplog.text
        assert "c0ffee" in caplog.text
    async with serving(zoo, Picky(), preload=("nobody", "tale")) as rig:
        assert rig.engine.loaded == {"chain-of-tale-1"}


@async_test
async def test_a_failed_start_leaves_nothing_behind() -> None:
    def no_zoo(url: str) -> Any:
        raise ZooNotFoundError(f"there is no zoo at {url}")

    server = EmbeddedServer(
        EmbeddedSettings.load(listen="127.0.0.1:0"), parts=Parts(open_zoo=no_zoo, import_engine=lambda: None)
    )
    with pytest.raises(ZooNotFoundError):
        await server.start()
    port = server.address
    async with serving(listen=port) as rig:
        assert await rig.client.models()


@async_test
async def test_importing_the_engine_and_reading_the_zoo_happen_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=30)
    zoo, engine = FakeZoo(), ScriptedEngine()
    zoo.add("tale")
    fakes = fake_parts(zoo, engine)

    def open_zoo(url: str) -> Any:
        both.wait()
        return fakes.open_zoo(url)

    parts = Parts(
        open_zoo=open_zoo, make_engine=fakes.make_engine, import_engine=lambda: both.wait() and None
    )
    server = EmbeddedServer(EmbeddedSettings.load(listen="127.0.0.1:0", drain_seconds=0), parts=parts)
    await server.start()
    names = {name for name, _, _ in server.timeline.stages}
    assert names == {"prepare", "open_zoo", "tokenizers", "import_engine", "engine", "preload"}
    await server.stop()
    assert not engine.is_running


@async_test
async def test_stopping_twice_and_stopping_before_starting_do_no_harm() -> None:
    server = EmbeddedServer(
        EmbeddedSettings.load(listen="127.0.0.1:0"), parts=fake_parts(FakeZoo(), ScriptedEngine())
    )
    await server.stop()
    async with serving() as rig:
        await rig.server.stop()
        await rig.server.stop()


@async_test
async def test_a_drain_can_be_cut_short() -> None:
    engine = ScriptedEngine()
    engine.hold_at = 1
    async with serving(engine=engine, drain_seconds=3600.0) as rig:
        chunks = aiter(rig.client.generate("tale", "x", max_tokens=3))
        await anext(chunks)
        stopping = asyncio.create_task(rig.server.stop())
        await asyncio.sleep(0)
        rig.server.cut_off()
        await stopping
        assert len(engine.closed) == 1


@async_test
async def test_a_template_process_that_does_not_start_keeps_no_other_request_from_being_served(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("blockserve.router.intake.chat.sys.executable", "/nonexistent/python")
    async with serving() as rig:
        assert "cannot be rendered yet" in caplog.text
        assert (await rig.client.generate("tale", "x", max_tokens=1).result()).token_ids


def test_the_timeline_is_in_order_of_beginning() -> None:
    timeline = Timeline(process_age=2.0)
    with timeline.stage("outer"), timeline.stage("inner"):
        pass
    assert str(timeline).split("=")[0] == "outer"
    assert all(2.0 <= began <= ended for _, began, ended in timeline.stages)


def test_the_age_of_the_process_includes_the_interpreters_start() -> None:
    code = (
        "import time; t = time.monotonic(); from blockserve.embedded.startup import process_age;"
        "own = time.monotonic() - t; age = process_age(); print(age >= own - 0.02 and age < own + 60)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "True"
    assert process_age() > 0


@pytest.mark.parametrize(
    "module",
    [
        "blockserve.router.fronts.servicer",
        "blockserve.client.blocking",
        "blockserve.embedded.settings",
        "blockserve",
    ],
)
def test_the_edge_runs_without_torch(module: str) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None;"
        f"import {module}; print('imported')"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "imported"


@async_test
async def test_a_client_waits_for_a_server_that_is_still_starting() -> None:
    async with serving() as rig, AsyncClient(rig.server.address) as client:
        await client.wait_ready(30)
        assert await client.models()
