"""The client where nothing but grpcio and protobuf is installed: what it imports, and that it works."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import tomllib
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from blockserve.common.api.engine import EngineRequest, TokenEvent
from blockserve.common.errors import MemoryBudgetError
from support.edge import ScriptedEngine, async_test, serving

ROOT = Path(__file__).resolve().parents[3]

OF_THE_ZOO = {"blockzoo", "blockzoo.errors", "blockzoo.extras", "blockzoo.progress"}
"""All that a client may import of the library; each imports the standard library only."""

BARE = """
import sys

OURS = {"blockserve", "blockzoo", "blockproto"}
INSTALLED = {"grpc", "typing_extensions"}  # the second comes with the first
PROTOBUF = ("google", "google.protobuf", "google._upb")


class BareInstall:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in OURS | INSTALLED | sys.stdlib_module_names:
            return None
        if name in PROTOBUF or name.startswith(tuple(f"{one}." for one in PROTOBUF[1:])):
            return None
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, BareInstall())
"""


def imported_after(code: str) -> set[str]:
    """Modules that an interpreter has imported after some code, but for those it starts with."""
    code = f"import sys\nbefore = set(sys.modules)\n{code}\nprint(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def below(package: str, modules: set[str]) -> set[str]:
    return {name for name in modules if f"{name}.".startswith(f"{package}.")}


@pytest.mark.parametrize(
    "use",
    [
        pytest.param("", id="imported"),
        pytest.param("with Client('127.0.0.1:1'): pass", id="made"),
    ],
)
def test_the_client_loads_neither_the_zoo_nor_what_it_needs(use: str) -> None:
    modules = imported_after(f"from blockserve import AsyncClient, Client, Credentials\n{use}")
    for package in ("numpy", "torch", "pydantic", "redis", "obstore", "blake3", "zstandard", "google.rpc"):
        assert not below(package, modules)
    assert below("blockzoo", modules) == OF_THE_ZOO
    assert not below("blockserve.client.operations", modules), "only operators call these"
    assert not below("blockserve.client.zoo", modules), "pushing needs the zoo"


def test_messages_are_loaded_when_a_client_is_made() -> None:
    assert not below("google.protobuf", imported_after("from blockserve import AsyncClient, Client"))
    assert below("google.protobuf", imported_after("from blockserve import Client\nClient().close()"))


def test_a_bare_install_brings_grpcio_and_protobuf() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {re.split(r"[^\w.-]", item)[0] for item in project["dependencies"]} == {"grpcio", "protobuf"}


CALLS = """
import json
from blockserve import Client
from blockserve.common.errors import MemoryBudgetError, SamplingError
from blockzoo.errors import VariantNotFoundError

said = {}
with Client(sys.argv[1], timeout=30, resume_attempts=0) as client:
    options = {"max_tokens": 6, "temperature": 0.0}
    said["generate"] = "".join(c.text for c in client.generate("tale", "In the beginning", **options))
    answer = client.chat("tale", "hi", request_id="asked", **options).result()
    said["chat"] = len(answer.token_ids)
    said["tokenize"] = client.tokenize("tale", "hello").text
    said["models"] = [model.name for model in client.models()]
    said["status"] = len(client.status().chains)
    said["trace"] = [call.outcome for call in client.trace("asked")]
    try:
        client.generate("tales", "x").result()
    except VariantNotFoundError as error:
        said["not found"] = [error.reason, list(error.suggestions), error.metadata["variant"]]
    try:
        client.generate("tale", "x", top_p=7.0).result()
    except SamplingError as error:
        said["sampling"] = error.field
    try:
        client.generate("tale", "full", max_tokens=1).result()
    except MemoryBudgetError as error:
        said["full"] = error.retry_after
print(json.dumps(said))
"""


class SometimesFull(ScriptedEngine):
    """Has no room for requests of one token."""

    async def generate(self, request: EngineRequest) -> AsyncIterator[Sequence[TokenEvent]]:
        """See `Engine`."""
        if request.max_tokens == 1:
            raise MemoryBudgetError("no room", retry_after=2.5)
        async for events in super().generate(request):
            yield events


@async_test
async def test_a_bare_install_calls_a_server_of_another_process() -> None:
    async with serving(engine=SometimesFull()) as rig:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", BARE + CALLS, rig.server.address, stdout=PIPE, stderr=PIPE
        )
        out, err = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, err.decode()
    assert json.loads(out) == {
        "generate": "hello wör",
        "chat": 6,
        "tokenize": "hello",
        "models": ["tale"],
        "status": 1,
        "trace": ["finished"],
        "not found": ["VARIANT_NOT_FOUND", ["tale"], "tales"],
        "sampling": "sampling.top_p",
        "full": 2.5,
    }


@pytest.mark.parametrize("package", ["numpy", "google.rpc", "rich"])
def test_a_bare_install_lacks_everything_else(package: str) -> None:
    """Or the test before would show nothing."""
    done = subprocess.run(
        [sys.executable, "-c", f"{BARE}\nimport {package}"], capture_output=True, check=False
    )
    assert b"ModuleNotFoundError" in done.stderr
