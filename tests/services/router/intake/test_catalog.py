"""Names to versions: seen at once when they change, kept by whoever already has one."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from blockserve.common.errors import PromptError
from blockserve.router.intake.catalog import DamagedVariant, VariantCatalog
from blockserve.router.limits import RouterConfig
from blockzoo.errors import CorruptManifestError, VariantNotFoundError
from blockzoo.folders.tokenizers.bounds import MAX_BYTES
from blockzoo.manifest import VariantRecord
from blockzoo.storage import LocalStorage
from blockzoo.zoo import Zoo
from support.edge import FakeZoo, async_test, tokenizer_json, variant_files
from support.zoo_faults import register, tensor


@async_test
async def test_a_new_version_is_seen_by_the_next_request_and_not_by_one_that_runs() -> None:
    zoo = FakeZoo()
    zoo.add("tale", "chain-1")
    catalog = VariantCatalog(zoo)
    running = await catalog.get("tale")
    zoo.add("tale", "chain-2")
    assert (await catalog.get("tale")).ref == "tale@2"
    assert (running.ref, running.record.chain) == ("tale@1", "chain-1")
    assert (await catalog.get("tale@1")).record.chain == "chain-1"


@async_test
async def test_between_refreshes_the_zoo_is_not_asked() -> None:
    zoo, now = FakeZoo(), 100.0
    zoo.add("tale")
    catalog = VariantCatalog(zoo, RouterConfig(refresh_seconds=5), clock=lambda: now)
    for _ in range(3):
        assert (await catalog.get("tale")).ref == "tale@1"
    assert zoo.num_resolved == 1
    zoo.add("tale")
    now += 4.9
    assert (await catalog.get("tale")).ref == "tale@1"
    now += 0.2
    assert (await catalog.get("tale")).ref == "tale@2"


@async_test
async def test_while_the_stamp_of_a_name_stays_the_zoo_is_not_asked() -> None:
    zoo = FakeZoo()
    zoo.add("tale")
    zoo.stamps["tale"] = (1,)
    catalog = VariantCatalog(zoo)
    for ref in ("tale", "tale@1"):
        for _ in range(3):
            assert (await catalog.get(ref)).ref == "tale@1"
    assert zoo.num_resolved == 2
    zoo.add("tale")
    zoo.stamps["tale"] = (2,)
    assert (await catalog.get("tale")).ref == "tale@2"
    assert (await catalog.get("tale")).ref == "tale@2"
    assert (await catalog.get("tale@1")).ref == "tale@1"
    assert zoo.num_resolved == 4
    del zoo.stamps["tale"]
    assert (await catalog.get("tale")).ref == "tale@2"
    assert zoo.num_resolved == 5


@async_test
async def test_what_changes_during_a_look_is_looked_up_again() -> None:
    zoo = FakeZoo()
    zoo.add("tale")
    zoo.stamps["tale"] = (1,)
    resolve = zoo.resolve

    def overtaken(ref: str) -> VariantRecord:
        record = resolve(ref)
        zoo.add("tale")
        zoo.stamps["tale"] = (2,)
        return record

    catalog = VariantCatalog(zoo)
    zoo.resolve = overtaken  # type: ignore[method-assign]
    assert (await catalog.get("tale")).ref == "tale@1"
    zoo.resolve = resolve  # type: ignore[method-assign]
    assert (await catalog.get("tale")).ref == "tale@2"


@async_test
async def test_the_versions_of_a_zoo_in_a_folder_are_seen_at_once(tmp_path: Path, monkeypatch: Any) -> None:
    """With stamps that settle sooner, versions come and go and every answer is what the zoo says then."""
    monkeypatch.setattr(LocalStorage, "SETTLED_NS", 30_000_000)
    writer, reader = (Zoo.open(tmp_path / "zoo", create=True) for _ in range(2))
    catalog, random = VariantCatalog(reader), Random(0)
    register(writer.store, "tale", [tensor(1)])
    for _ in range(40):
        match random.randrange(4):
            case 0:
                register(writer.store, "tale", [tensor(1)])
            case 1:
                old = random.choice(writer.versions("tale"))
                if old.version != writer.resolve("tale").version:
                    writer.store.remove_version("tale", old.version)
            case _:
                await asyncio.sleep(0.05)
        assert (await catalog.get("tale")).ref == f"tale@{writer.resolve('tale').version}"


@async_test
async def test_small_files_are_read_once_per_version() -> None:
    zoo = FakeZoo()
    zoo.add("tale")
    catalog = VariantCatalog(zoo)
    for _ in range(3):
        variant = await catalog.get("tale")
        await catalog.encode(variant, "hello", add_special_tokens=True)
    assert len(zoo.files_read) == len(set(zoo.files_read))


@async_test
async def test_variants_with_the_same_tokenizer_share_it() -> None:
    zoo = FakeZoo()
    zoo.add("tale")
    zoo.add("song")
    catalog = VariantCatalog(zoo)
    first = await catalog.tokenizer(await catalog.get("tale"))
    assert first is await catalog.tokenizer(await catalog.get("song"))


@async_test
async def test_no_such_variant_suggests_near_names() -> None:
    zoo = FakeZoo()
    zoo.add("tale")
    with pytest.raises(VariantNotFoundError) as caught:
        await VariantCatalog(zoo).get("tael")
    assert caught.value.suggestions == ("tale",)


@async_test
async def test_a_variant_without_a_tokenizer_takes_token_ids_only() -> None:
    zoo = FakeZoo()
    zoo.add("tale", files=variant_files(tokenizer_json=None))
    catalog = VariantCatalog(zoo)
    variant = await catalog.get("tale")
    assert await catalog.tokenizer(variant) is None
    with pytest.raises(PromptError) as caught:
        await catalog.encode(variant, "hello", add_special_tokens=True)
    assert caught.value.hint == "Send token ids."


@async_test
async def test_a_stored_tokenizer_is_held_to_the_bounds_of_register() -> None:
    """An earlier release registered it, or it came with a copy of another zoo; token ids are taken."""
    zoo = FakeZoo()
    steps = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 129}}
    many = json.dumps(json.loads(tokenizer_json()) | steps).encode()
    zoo.add("many", files=variant_files(tokenizer_json=many))
    record = zoo.add("large")
    reference = record.files["tokenizer.json"]
    zoo.records["large"] = [replace(record, files={"tokenizer.json": replace(reference, size=MAX_BYTES + 1)})]
    catalog = VariantCatalog(zoo)
    for name, why in (("many", "components, more than 128"), ("large", f"it has {MAX_BYTES + 1} bytes")):
        variant = await catalog.get(name)
        zoo.files_read.clear()
        with pytest.raises(PromptError, match=why) as caught:
            await catalog.encode(variant, "hello", add_special_tokens=True)
        assert "send token ids" in caught.value.hint
        assert ("tokenizer.json" in zoo.files_read) == (name == "many")  # the size is known before


@async_test
async def test_pages_are_in_the_order_of_names_and_describe_only_their_own() -> None:
    zoo = FakeZoo()
    for name in ("d", "b", "a", "c", "e"):
        zoo.add(name, files={"generation_config.json": json.dumps({"name": name}).encode()})
    catalog = VariantCatalog(zoo)
    first, more = await catalog.page("", 2)
    assert ([variant.record.name for variant in first], more) == (["a", "b"], True)
    assert len(zoo.files_read) == 2
    last, more = await catalog.page("c", 2)
    assert ([variant.record.name for variant in last], more) == (["d", "e"], False)
    assert await catalog.page("e", 2) == ([], False)


@async_test
async def test_chains_know_their_variants_older_versions_in_use_included() -> None:
    zoo = FakeZoo()
    zoo.add("tale", "shared")
    zoo.add("song", "shared")
    catalog = VariantCatalog(zoo)
    await catalog.get("tale")
    zoo.add("tale", "other")
    assert await catalog.refs_by_chain() == {"shared": ("song@1", "tale@1"), "other": ("tale@2",)}


@async_test
async def test_the_cache_of_variants_is_bounded() -> None:
    zoo = FakeZoo()
    for name in "abc":
        zoo.add(name)
    catalog = VariantCatalog(zoo, RouterConfig(cached_variants=2))
    for name in "abcabc":
        assert (await catalog.get(name)).record.name == name
    assert len(catalog._served) == 2


@async_test
async def test_a_damaged_ref_is_listed_as_damaged_and_hides_no_other(tmp_path: Path) -> None:
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    for number, name in enumerate(("bad", "good", "other")):
        register(zoo.store, name, [tensor(number)])
    (tmp_path / "zoo" / "refs" / "variants" / "bad" / "1").write_bytes(b"{}")
    catalog = VariantCatalog(zoo)
    page, more = await catalog.page("", 2)
    assert [one.record.name for one in page] == ["bad", "good"]
    assert more
    assert isinstance(page[0], DamagedVariant)
    assert page[0].error.reason == "CORRUPT_MANIFEST"
    refs = [ref for refs in (await catalog.refs_by_chain()).values() for ref in refs]
    assert sorted(refs) == ["good@1", "other@1"]
    with pytest.raises(CorruptManifestError):
        await catalog.get("bad")
