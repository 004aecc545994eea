"""A zoo that a later release wrote: what docs/compatibility.md promises of zoo.json and kinds of blocks."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from blockserve.client.aio import AsyncClient
from blockserve.client.zoo import RemoteZoo
from blockserve.common.errors import NoPathError
from blockzoo.canonical import canonical_json, digest_json
from blockzoo.errors import BlockzooError, FormatVersionError, InvalidConfigError
from blockzoo.manifest import BlockManifest, ChainManifest, Link
from blockzoo.store.zoo_store import FORMAT
from blockzoo.zoo import Zoo
from support.cluster import PATIENCE, Cluster, Process, cluster
from support.edge import async_test
from support.forked import run_blockzoo
from support.variants import VariantFactory

PROMPT = "Every tenant sends requests"
SETTINGS = {
    "BLOCKZOO_ENGINE_DTYPE": "float32",
    "BLOCKZOO_ENGINE_NUM_THREADS": "1",
    "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(16 << 20),
    "BLOCKZOO_FAILOVER_PATH_SECONDS": "2",
}
NEEDS = f"needs format {FORMAT + 1} to {{}}; this blockzoo knows format {FORMAT}"
LISTS = (["ls"], ["show", "base"], ["du"], ["diff", "base", "newer"], ["verify"])
SERVICES = [[verb, "--listen", "127.0.0.1:0"] for verb in ("serve", "worker", "router", "controller")]
CHANGES = (
    ["register", "{folder}", "--name", "more"],
    ["rm", "base", "--yes"],
    ["gc"],
)


@pytest.fixture
def zoo(base_zoo: Zoo) -> Zoo:
    """A variant that any release runs, and one with a block of a kind that is yet to be invented."""
    register_something_new(base_zoo, "newer", applied=True)
    register_something_new(base_zoo, "newest", applied=False)
    return base_zoo


def register_something_new(zoo: Zoo, name: str, *, applied: bool) -> None:
    """The base with something in its third layer, or in place of it, that this release cannot run."""
    known = zoo.resolve("base")
    chain = zoo.chain(known.chain)
    layer = zoo.block(chain.links[3].base)
    with zoo.store.registration(name) as write:
        write.rely_on_variant(known)
        block = write.put_block(BlockManifest("hypernetwork", layer.family, layer.config, layer.tensors))
        link = Link(chain.links[3].base, (block,)) if applied else Link(block)
        links = (*chain.links[:3], link, *chain.links[4:])
        new = write.put_chain(ChainManifest(chain.family, links, chain.context_length, chain.vocab_size))
        write.commit(name, new, kind=known.kind, files=known.files)


def advance(zoo: Path, **fields: int) -> None:
    """Say that a later release wrote the zoo; like ours it seals what it says with a digest."""
    path = zoo / "zoo.json"
    said = json.loads(path.read_text()) | {"format": FORMAT + 1, "created_by": "a later one", "mood": 1}
    said = {key: value for key, value in (said | fields).items() if key != "digest"}
    path.chmod(0o644)
    path.write_bytes(canonical_json({**said, "digest": digest_json(said)}))


def blockzoo(zoo: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_blockzoo(*words, BLOCKZOO_ZOO=str(zoo), BLOCKZOO_STATE_URL="memory:")


def content(zoo: Path) -> dict[str, bytes]:
    """Every object of a zoo."""
    return {str(path.relative_to(zoo)): path.read_bytes() for path in zoo.rglob("*") if path.is_file()}


async def ask(client: AsyncClient, model: str, **options: Any) -> tuple[int, ...]:
    wanted = {"max_tokens": 16, "ignore_eos": True, "temperature": 0, "timeout": 60.0, **options}
    return (await client.generate(model, PROMPT, **wanted).result()).token_ids


@pytest.mark.parametrize("words", [*LISTS[:2], *SERVICES, CHANGES[0]], ids=lambda words: words[0])
def test_a_zoo_that_needs_a_later_reader_is_refused_by_everything(
    factory: VariantFactory, zoo: Zoo, tmp_path: Path, words: list[str]
) -> None:
    advance(tmp_path / "zoo", min_reader=FORMAT + 1, min_writer=FORMAT + 1)
    before = content(tmp_path / "zoo")
    folder = str(factory.checkpoint("llama-gqa-tied").path)
    said = blockzoo(tmp_path / "zoo", *(word.format(folder=folder) for word in words))
    assert said.returncode == 1, said
    assert NEEDS.format("read") in said.stderr
    assert "Upgrade blockzoo." in said.stderr
    assert "Traceback" not in said.stderr
    assert content(tmp_path / "zoo") == before


@pytest.mark.parametrize("service", ["worker", "router", "controller", "embedded"])
def test_processes_without_the_command_line_say_it_too(zoo: Zoo, tmp_path: Path, service: str) -> None:
    advance(tmp_path / "zoo", min_reader=FORMAT + 1)
    where = {"BLOCKZOO_ZOO": str(tmp_path / "zoo"), "BLOCKZOO_LISTEN": "127.0.0.1:0"}
    process = Process(f"blockserve.{service}", where, tmp_path / "log")
    with pytest.raises(AssertionError, match="did not start"):
        asyncio.run(process.start())
    assert process.popen is not None
    assert process.popen.wait(PATIENCE) == 1
    assert (tmp_path / "log").read_text().count(NEEDS.format("read")) == 1


def test_a_zoo_that_needs_a_later_writer_is_read_and_never_changed(
    factory: VariantFactory, zoo: Zoo, tmp_path: Path
) -> None:
    advance(tmp_path / "zoo", min_writer=FORMAT + 1)
    before = content(tmp_path / "zoo")
    for words in LISTS:
        assert blockzoo(tmp_path / "zoo", *words).returncode == 0, words
    rows = json.loads(blockzoo(tmp_path / "zoo", "ls", "--json").stdout)["variants"]
    assert [row["name"] for row in rows] == ["base", "newer", "newest"]
    folder = str(factory.checkpoint("llama-gqa-tied").path)
    for change in CHANGES:
        said = blockzoo(tmp_path / "zoo", *(word.format(folder=folder) for word in change), "--json")
        assert said.returncode == 1, (change, said)
        error = json.loads(said.stderr)["error"]
        assert error["reason"] == "FORMAT_VERSION", change
        assert NEEDS.format("write") in error["message"]
    assert content(tmp_path / "zoo") == before


@async_test
async def test_a_cluster_serves_a_zoo_that_it_must_not_change(
    factory: VariantFactory, zoo: Zoo, tmp_path: Path
) -> None:
    """Controller, router and worker; what would write through them is refused with the same error."""
    async with cluster(zoo, tmp_path, ["a"], **SETTINGS) as rig:
        async with rig.client() as client:
            await rig.load("a", "base")
            expected = await ask(client, "base")
        advance(tmp_path / "zoo", min_writer=FORMAT + 1)
        before = content(tmp_path / "zoo")
        for process in (rig.workers["a"], rig.routers[0]):
            assert await process.terminate() == 0
            await process.start()
        controller = await rig.start_controller()
        async with rig.client() as client:
            assert await ask(client, "base") == expected
        path = factory.checkpoint("llama-gqa-tied").path
        with RemoteZoo(controller.address) as remote:
            assert [row.name for row in await asyncio.to_thread(remote.ls)] == ["base", "newer", "newest"]
            with pytest.raises(FormatVersionError, match=NEEDS.format("write")):
                await asyncio.to_thread(remote.register, path, name="more")
            with pytest.raises(FormatVersionError, match=NEEDS.format("write")):
                await asyncio.to_thread(remote.rm, "base")
        for process in (rig.routers[0], controller):
            words = ("pin", "base", "--server", process.address, "--json")
            said = await asyncio.to_thread(blockzoo, tmp_path / "zoo", *words)
            assert said.returncode == 1
            assert json.loads(said.stderr)["error"]["reason"] == "FORMAT_VERSION"
        assert content(tmp_path / "zoo") == before


@pytest.mark.parametrize("model", ["newer", "newest"])
def test_blocks_of_unknown_kinds_are_listed_and_never_run(zoo: Zoo, tmp_path: Path, model: str) -> None:
    """Where controllers place: nobody loads the variant, its caller is told, and the others are served."""
    advance(tmp_path / "zoo")
    assert blockzoo(tmp_path / "zoo", "backup", str(tmp_path / "copy")).returncode == 0
    for place in ("zoo", "copy"):
        assert "hypernetwork" in blockzoo(tmp_path / place, "show", model).stdout

    async def work(rig: Cluster) -> None:
        await rig.start_controller(BLOCKZOO_LOOK_SECONDS="0.3")
        async with rig.client() as client:
            expected = await ask(client, "base")
            with pytest.raises(BlockzooError) as caught:
                await ask(client, model)
            assert isinstance(caught.value, NoPathError | InvalidConfigError), caught.value
            assert await ask(client, "base") == expected
        held = (await rig.describe("a")).spans
        assert {span.chain_digest for span in held} == {zoo.resolve("base").chain}
        assert "blocks of kind 'hypernetwork' cannot be" in rig.log("a") or "block of kind" in rig.log("a")

    async def run() -> None:
        async with cluster(zoo, tmp_path, ["a"], **SETTINGS) as rig:
            await work(rig)

    asyncio.run(asyncio.wait_for(run(), 250))
