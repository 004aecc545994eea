"""Adapters named by their place: what may be named, registered once, bounded, and gone again."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockserve.common.errors import ConfigurationError, UnregisteredRefusedError
from blockserve.router.intake.catalog import VariantCatalog
from blockserve.router.intake.unregistered import Place, UnregisteredAdapters, parse_place
from blockzoo.errors import (
    AdapterError,
    BlockzooError,
    InvalidNameError,
    PathEscapeError,
    VariantNotFoundError,
)
from blockzoo.names import RESERVED_PREFIX
from blockzoo.registering.job import RegisterResult
from blockzoo.zoo import Zoo
from support.edge import FakeZoo, async_test
from support.folders import adapter_config, config, write_adapter, write_checkpoint
from support.hub_server import hub_server
from support.paths import ROOT


class CountingZoo(Zoo):
    """Counts registrations on demand."""

    num_registered = 0

    def register(self, *args: object, **named: object) -> RegisterResult:
        if named.get("on_demand"):
            self.num_registered += 1
        return super().register(*args, **named)  # type: ignore[arg-type]


@pytest.fixture
def zoo(tmp_path: Path) -> CountingZoo:
    zoo = CountingZoo(Zoo.open(tmp_path / "zoo", create=True).store)
    zoo.register(write_checkpoint(tmp_path / "base"), name="base")
    return zoo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The allowed folder, with three adapters."""
    for number, name in enumerate(("one", "two", "three")):
        write_adapter(tmp_path / "adapters" / name, adapter_config(lora_alpha=number + 1))
    return tmp_path / "adapters"


def names(zoo: Zoo) -> list[str]:
    return [record.name for record in zoo.variants() if record.name.startswith(RESERVED_PREFIX)]


def serving(zoo: Zoo, *allowed: object, most: int = 8) -> VariantCatalog:
    adapters = UnregisteredAdapters(zoo, [str(one) for one in allowed], most)
    return VariantCatalog(zoo, unregistered=adapters)


@async_test
async def test_an_adapter_is_the_variant_that_registering_it_makes(zoo: CountingZoo, folder: Path) -> None:
    catalog = serving(zoo, folder)
    expected = zoo.register(folder / "one", name="named", base="base").record
    served = await catalog.get(f"base+path:{folder}/one")
    assert served.record.chain == expected.chain
    assert served.record.provenance["source"] == str(folder / "one")
    assert (await catalog.get(f"base@1+path:{folder}/two/../one")).ref == served.ref
    assert zoo.num_registered == 1


@async_test
async def test_requests_that_come_together_register_it_once(zoo: CountingZoo, folder: Path) -> None:
    catalog = serving(zoo, folder)
    refs = [f"base+path:{folder}/one"] * 6 + [f"base+path:{folder}/two"] * 6
    served = await asyncio.gather(*map(catalog.get, refs))
    assert zoo.num_registered == 2
    assert len({one.ref for one in served}) == 2


@async_test
async def test_a_caller_that_goes_away_leaves_the_others_their_registration(
    zoo: CountingZoo, folder: Path
) -> None:
    catalog = serving(zoo, folder)
    first, second = (asyncio.create_task(catalog.get(f"base+path:{folder}/one")) for _ in range(2))
    while not zoo.num_registered:
        await asyncio.sleep(0.001)
    first.cancel()
    assert (await second).record.kind == "adapter"
    assert zoo.num_registered == 1


@async_test
async def test_files_that_change_make_the_next_version(zoo: CountingZoo, folder: Path) -> None:
    catalog = serving(zoo, folder)
    before = await catalog.get(f"base+path:{folder}/one")
    write_adapter(folder / "one", adapter_config(lora_alpha=9))
    after = await catalog.get(f"base+path:{folder}/one")
    assert (before.record.name, before.record.version) == (after.record.name, after.record.version - 1)
    assert before.record.chain != after.record.chain


@async_test
async def test_of_files_that_change_again_and_again_two_versions_stay(zoo: CountingZoo, folder: Path) -> None:
    catalog = serving(zoo, folder, most=1)
    for alpha in range(4, 9):
        write_adapter(folder / "one", adapter_config(lora_alpha=alpha))
        served = await catalog.get(f"base+path:{folder}/one")
    assert [record.version for record in zoo.versions(served.record.name)] == [4, 5]
    assert served.record.version == 5


@async_test
async def test_the_least_recently_named_is_removed(zoo: CountingZoo, folder: Path) -> None:
    catalog = serving(zoo, folder, most=2)
    one = await catalog.get(f"base+path:{folder}/one")
    two = await catalog.get(f"base+path:{folder}/two")
    await catalog.get(f"base+path:{folder}/one")
    three = await catalog.get(f"base+path:{folder}/three")
    assert names(zoo) == sorted((one.record.name, three.record.name))
    again = await catalog.get(f"base+path:{folder}/two")
    assert again.record.chain == two.record.chain
    assert len(names(zoo)) == 2


@async_test
async def test_what_an_earlier_process_left_counts(zoo: CountingZoo, folder: Path) -> None:
    left = await serving(zoo, folder).get(f"base+path:{folder}/one")
    catalog = serving(zoo, folder, most=1)
    assert (await catalog.get(f"base+path:{folder}/one")).ref == left.ref
    await catalog.get(f"base+path:{folder}/two")
    assert left.record.name not in names(zoo)


@async_test
async def test_one_that_somebody_removes_is_registered_again(zoo: CountingZoo, folder: Path) -> None:
    catalog = serving(zoo, folder)
    one = await catalog.get(f"base+path:{folder}/one")
    zoo.rm(one.record.name)
    again = await catalog.get(f"base+path:{folder}/one")
    assert (again.record.name, again.record.chain) == (one.record.name, one.record.chain)


@async_test
async def test_a_new_version_of_the_base_is_another_adapter(
    zoo: CountingZoo, folder: Path, tmp_path: Path
) -> None:
    catalog = serving(zoo, folder)
    before = await catalog.get(f"base+path:{folder}/one")
    zoo.register(write_checkpoint(tmp_path / "newer", config(rms_norm_eps=1e-3)), name="base")
    after = await catalog.get(f"base+path:{folder}/one")
    assert after.record.provenance["base"] == "base@2"
    assert (await catalog.get(f"base@1+path:{folder}/one")).ref == before.ref


@async_test
async def test_nothing_outside_the_folders_can_be_named(
    zoo: CountingZoo, folder: Path, tmp_path: Path
) -> None:
    outside = write_adapter(tmp_path / "adapters-of-others" / "secret")
    (folder / "link").symlink_to(outside)
    (folder / "loop").symlink_to(folder / "loop")
    catalog = serving(zoo, folder)
    places = (
        outside,
        folder / "link",
        f"{folder}/../{outside.parent.name}/secret",
        tmp_path / "nothing",
        "/",
    )
    for place in places:
        with pytest.raises(UnregisteredRefusedError, match="not one that the operator lists"):
            await catalog.get(f"base+path:{place}")
    with pytest.raises(UnregisteredRefusedError, match="does not list this model"):
        await catalog.get("base+hub:org/adapter")
    inside = write_adapter(folder / "linked")
    (inside / "adapter_model.safetensors").unlink()
    (inside / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    with pytest.raises(PathEscapeError):
        await catalog.get(f"base+path:{inside}")
    with pytest.raises(BlockzooError):
        await catalog.get(f"base+path:{folder}/loop")
    assert names(zoo) == []


@async_test
async def test_mistakes_are_typed(zoo: CountingZoo, folder: Path, tmp_path: Path) -> None:
    write_checkpoint(folder / "whole")
    catalog = serving(zoo, folder)
    for ref, error in (
        (f"nobody+path:{folder}/one", VariantNotFoundError),
        (f"base+path:{folder}/nothing", AdapterError),
        (f"base+path:{folder}/whole", AdapterError),
        (f"base+path:{folder}", AdapterError),
    ):
        with pytest.raises(error):
            await catalog.get(ref)
    assert names(zoo) == []


@pytest.mark.parametrize(
    "text",
    [
        *("", "path", "path:", "path:adapters/one", "path:/a\0b", "path:/" + "x" * 5000, "ftp:/x"),
        *("hub:", "hub:name", "hub:a/b@", "hub:a/b@refs/pr/1", "hub:a/../b"),
    ],
)
def test_places_that_are_none(text: str) -> None:
    with pytest.raises(InvalidNameError, match="where an adapter lies"):
        parse_place(text)


def test_places() -> None:
    assert parse_place("path:/a b/c+d@1") == Place("path", "/a b/c+d@1")
    assert parse_place("hub:org/name") == Place("hub", "org/name")
    assert parse_place("hub:org/name@v1.0") == Place("hub", "org/name", "v1.0")


@async_test
async def test_off_means_refused_with_a_hint() -> None:
    zoo = FakeZoo()
    zoo.add("base")
    with pytest.raises(UnregisteredRefusedError, match="takes registered variants only") as refused:
        await VariantCatalog(zoo).get("base+path:/adapters/one")
    assert "--allow-unregistered" in refused.value.hint


@pytest.mark.parametrize("entry", ["/nowhere/at/all", "hub:name", "hub:a/b@c/d"])
def test_settings_that_allow_nothing_are_refused(zoo: CountingZoo, entry: str) -> None:
    with pytest.raises(ConfigurationError, match="allow_unregistered"):
        UnregisteredAdapters(zoo, [entry], 1)


def test_reserved_names_are_the_servers(zoo: CountingZoo, folder: Path) -> None:
    with pytest.raises(InvalidNameError, match="as names that servers give"):
        zoo.register(folder / "one", name="unregistered.mine", base="base")


SCRIPT = """
import asyncio, json, sys
from blockserve.router.intake.catalog import VariantCatalog
from blockserve.router.intake.unregistered import UnregisteredAdapters
from blockzoo.errors import BlockzooError
from blockzoo.zoo import Zoo

async def main():
    zoo = Zoo.open(sys.argv[1])
    catalog = VariantCatalog(zoo, unregistered=UnregisteredAdapters(zoo, json.loads(sys.argv[2]), 8))
    for ref in json.loads(sys.argv[3]):
        try:
            print(json.dumps(dict((await catalog.get(ref)).record.provenance)))
        except BlockzooError as error:
            print(json.dumps({"reason": error.reason}))

asyncio.run(main())
"""


def test_models_of_the_hub(zoo: CountingZoo, folder: Path, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    with hub_server() as hub:
        hub.models = {
            "org/a": {"main": folder / "one", "dev": folder / "two"},
            "org/pinned": {"main": folder / "one", "v1": folder / "two"},
            "org/whole": {"main": tmp_path / "base"},
            "org/other": {"main": folder / "one"},
        }
        asked = {
            "base+hub:org/a": hub.commit("org/a", "main"),
            "base+hub:org/a@dev": hub.commit("org/a", "dev"),
            "base+hub:org/pinned": hub.commit("org/pinned", "v1"),
            "base+hub:org/pinned@main": "UNREGISTERED_REFUSED",
            "base+hub:org/other": "UNREGISTERED_REFUSED",
            "base+hub:org/whole": "INVALID_ADAPTER",
            "base+hub:org/a@none": "HUB_MODEL_NOT_FOUND",
        }
        allowed = ["hub:org/a", "hub:org/pinned@v1", "hub:org/whole"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
        }
        environment["PYTHONPATH"] = os.pathsep.join(
            str(ROOT / part) for part in ("", "services", "kernels", "proto")
        )
        words = [str(tmp_path / "zoo"), json.dumps(allowed), json.dumps(list(asked))]
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one.get("revision") or one["reason"] for one in answers] == list(asked.values())
