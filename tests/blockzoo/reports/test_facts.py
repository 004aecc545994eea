"""`ls` from what is kept of chains: as from the manifests, never out of date, whatever the file holds."""

import shutil

import pytest

from blockzoo import Zoo, layout
from blockzoo.errors import CorruptManifestError
from blockzoo.reports import facts
from support.folders import adapter_config, adapter_tensors, config, tensors, write_adapter, write_checkpoint
from support.zoo_faults import lose


@pytest.fixture
def filled(tmp_path):
    """A base, a checkpoint stored as differences, one with tensors of its own, adapters, two versions."""
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    values = config()
    items = tensors(values)
    zoo.register(write_checkpoint(tmp_path / "base", values, items), name="base")
    near = {name: nudged(item) for name, item in items.items()}
    zoo.register(write_checkpoint(tmp_path / "near", values, near), name="near", base="base")
    other = tensors(values, seed=1)
    far = {name: other[name] if ".layers.2." in name else item for name, item in items.items()}
    zoo.register(write_checkpoint(tmp_path / "far", values, far), name="far")
    for rank in (4, 2):
        folder = write_adapter(
            tmp_path / f"r{rank}", adapter_config(r=rank), adapter_tensors(values, rank=rank)
        )
        zoo.register(folder, name=f"bot-{rank}", base="base")
    zoo.register(tmp_path / "r2", name="bot-4", base="base")
    return zoo


def nudged(item):
    """Nearly the same tensor: stored as a difference, which is smaller."""
    data = bytearray(item.data * 1)
    data[0] ^= 1
    return type(item)(item.dtype, item.shape, bytes(data))


def test_sizes_are_those_of_the_manifests(filled):
    usage = {row.name: row for row in filled.du().rows}
    for row in filled.ls():
        assert row.private_bytes == usage[row.name].private_bytes
        assert row.private_stored_bytes == usage[row.name].private_stored_bytes
        report = filled.show(row.name)
        assert (row.checkpoint_bytes, row.private_bytes) == (report.checkpoint_bytes, report.private_bytes)
        assert (row.family, row.num_layers) == (report.family, 3)


@pytest.mark.parametrize("name", ["base", "near", "far", "bot-4", "bot-2"])
def test_what_removing_frees_is_what_gc_frees(filled, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "zoo", copy)
    zoo = Zoo.open(copy)
    promised = next(row.freed_bytes for row in zoo.du().rows if row.name == name)
    zoo.rm(name)
    refs = sum(info.size for info in zoo.store.storage.list(f"{layout.REFS}/{name}"))
    freed = zoo.gc(grace_s=0).freed_bytes
    assert freed - refs <= promised <= freed


def test_a_new_process_reads_no_manifest_again(filled, tmp_path, monkeypatch):
    expected = filled.ls()
    kept = tmp_path / "kept"
    assert Zoo.open(tmp_path / "zoo", facts_folder=kept).ls() == expected
    manifests = ("chains", "blocks")
    lose(filled.store, *(info.key for folder in manifests for info in filled.store.storage.list(folder)))
    zoo = Zoo.open(tmp_path / "zoo", facts_folder=kept)
    assert zoo.ls() == expected
    assert {row.kind for row in Zoo.open(tmp_path / "zoo").ls()} == {"damaged"}


def test_what_changes_is_seen_at_once(filled, tmp_path):
    kept = tmp_path / "kept"
    zoo = Zoo.open(tmp_path / "zoo", facts_folder=kept)
    zoo.ls()
    filled.register(tmp_path / "r2", name="new", base="base")
    filled.rollback("bot-4")
    filled.rm("far")
    filled.gc(grace_s=0)
    fresh = Zoo.open(tmp_path / "zoo", facts_folder=kept).ls()
    assert zoo.ls() == fresh == Zoo.open(tmp_path / "zoo").ls()
    rows = {row.name: row for row in fresh}
    assert set(rows) == {"base", "bot-2", "bot-4", "near", "new"}
    assert rows["bot-4"].version == 3
    assert rows["new"].private_bytes == rows["bot-2"].private_bytes


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0" + bytes(100)])
def test_a_damaged_file_is_passed_by(filled, tmp_path, content):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / facts.FILE).write_bytes(content)
    assert Zoo.open(tmp_path / "zoo", facts_folder=kept).ls() == filled.ls()


def test_a_folder_that_cannot_be_written_is_passed_by(filled, tmp_path):
    (tmp_path / "file").write_text("")
    assert Zoo.open(tmp_path / "zoo", facts_folder=tmp_path / "file").ls() == filled.ls()


def test_a_file_that_has_grown_is_begun_again(filled, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    Zoo.open(tmp_path / "zoo", facts_folder=kept).ls()
    monkeypatch.setattr(facts, "MAX_FILE_BYTES", 10)
    filled.register(tmp_path / "r4", name="new", base="base")
    filled.register(tmp_path / "base", name="again")
    Zoo.open(tmp_path / "zoo", facts_folder=kept).ls()
    assert (kept / facts.FILE).exists()


def test_a_block_that_is_none_is_damage_of_its_variants(filled):
    chain = filled.chain(filled.resolve("base").chain)
    key = layout.block_key(chain.links[1].base)
    filled.store.storage.replace(key, [b"{}"])
    rows = {row.name: row.kind for row in filled.ls()}
    assert rows["base"] == "damaged"
    with pytest.raises(CorruptManifestError):
        filled.show("base")
