import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockzoo import layout
from blockzoo.errors import CorruptManifestError, VariantNotFoundError
from blockzoo.json_report import JsonReport
from blockzoo.zoo import Zoo
from support.folders import (
    adapter_config,
    adapter_tensors,
    config,
    tensor,
    tensors,
    write_adapter,
    write_checkpoint,
)

TUNED = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def zoo(tmp_path):
    """A base, a copy with the last layer tuned, and an adapter on the base."""
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    items = tensors(config())
    zoo.register(write_checkpoint(tmp_path / "base", items=items), name="base")
    tuned = {**items, TUNED: tensor(items[TUNED].shape, seed="tuned")}
    zoo.register(write_checkpoint(tmp_path / "tuned", items=tuned), name="tuned")
    zoo.register(write_adapter(tmp_path / "lora"), name="lora", base="base")
    return zoo


def size(items):
    return sum(len(item.data) for item in items.values())


FILES = sum(map(len, (json.dumps(config()), '{"model": {}}', '{"eos_token_id": 2}')))


def test_ls(zoo):
    rows = {row.name: row for row in zoo.ls()}
    assert list(rows) == ["base", "lora", "tuned"]
    base, lora, tuned = rows["base"], rows["lora"], rows["tuned"]
    assert (base.kind, base.family, base.num_layers, base.base) == ("checkpoint", "llama", 3, None)
    assert (lora.kind, lora.base) == ("adapter", "base@1")
    assert base.checkpoint_bytes == size(tensors(config())) + FILES
    assert tuned.private_bytes == len(tensors(config())[TUNED].data)
    assert base.private_bytes == len(tensors(config())[TUNED].data) * 0
    assert lora.private_bytes > size(adapter_tensors(config()))
    assert json.loads(json.dumps([row.to_json() for row in rows.values()]))[0]["name"] == "base"


def test_du_adds_up(zoo):
    report = zoo.du()
    assert [row.name for row in report.rows] == ["base", "lora", "tuned"]
    assert report.checkpoint_bytes == sum(row.checkpoint_bytes for row in report.rows)
    blobs = {info.key: info.size for info in zoo.store.storage.list("blobs")}
    assert report.stored_bytes == sum(blobs.values())
    assert report.unreachable_bytes == 0
    assert report.distinct_bytes < report.stored_bytes
    assert report.sharing_factor == report.checkpoint_bytes / report.stored_bytes
    assert json.loads(json.dumps(report.to_json()))["sharing_factor"] == round(report.sharing_factor, 4)


def test_du_of_an_empty_zoo(tmp_path):
    report = Zoo.open(tmp_path / "zoo", create=True).du()
    assert (report.rows, report.checkpoint_bytes, report.stored_bytes) == ((), 0, 0)
    assert report.sharing_factor == 1.0


def test_removed_variants_become_unreachable_until_gc(zoo):
    private = {row.name: row.private_stored_bytes for row in zoo.du().rows}
    removed = zoo.rm("tuned")
    assert (removed.removed, removed.remaining) == ((1,), ())
    assert zoo.du().unreachable_bytes == private["tuned"] > 0
    zoo.gc(grace_s=0)
    assert zoo.du().unreachable_bytes == 0
    assert zoo.verify().ok


def test_versions_count_together(zoo, tmp_path):
    before = {row.name: row for row in zoo.du().rows}["tuned"]
    path = write_checkpoint(tmp_path / "again", items=tensors(config(), seed=3))
    zoo.register(path, name="tuned")
    after = {row.name: row for row in zoo.du().rows}["tuned"]
    assert (before.versions, after.versions) == (1, 2)
    assert after.checkpoint_bytes == 2 * before.checkpoint_bytes
    assert after.private_bytes >= before.private_bytes + size(tensors(config()))
    assert zoo.rm("tuned@1").remaining == (2,)
    assert {row.name: row.versions for row in zoo.du().rows}["tuned"] == 1


def test_bases_of_differences_are_in_use(tmp_path):
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    values = config(hidden_size=64, intermediate_size=256, vocab_size=5000)
    items = tensors(values)
    zoo.register(write_checkpoint(tmp_path / "a", values, items), name="a")
    for name, item in items.items():
        changed = bytearray(item.data)
        changed[0] ^= 1
        items[name] = type(item)(item.dtype, item.shape, bytes(changed))
    zoo.register(write_checkpoint(tmp_path / "b", values, items), name="b", base="a")
    usage = {row.name: row for row in zoo.du().rows}
    assert usage["b"].private_stored_bytes < 0.3 * usage["b"].private_bytes
    zoo.rm("a")
    zoo.gc(grace_s=0)
    report = zoo.du()
    assert report.unreachable_bytes == 0
    assert report.stored_bytes > 0.9 * report.distinct_bytes
    zoo.export("b", tmp_path / "out")


def test_show_draws_the_chain_as_runs(zoo):
    base = zoo.show("base")
    assert [(run.label, run.shared_with) for run in base.runs] == [
        ("embedding", ("lora", "tuned")),
        ("layers 0-1", ("lora", "tuned")),
        ("layer 2", ("lora",)),
        ("head", ("lora", "tuned")),
    ]
    tuned = zoo.show("tuned")
    assert tuned.draw() == "embedding -> layers 0-1 -> [layer 2] -> head"
    lora = zoo.show("lora@1")
    assert lora.draw() == "embedding -> layers 0-1 + adapter -> layer 2 + adapter -> head"
    (adapter,) = lora.runs[1].applied
    assert (adapter.kind, adapter.modules, adapter.ranks) == (
        "adapter", ("self_attn.q_proj", "self_attn.v_proj"), (4,),
    )  # fmt: skip
    assert adapter.num_bytes + lora.runs[2].applied[0].num_bytes == size(adapter_tensors(config()))


def test_show_says_where_a_variant_comes_from(zoo, tmp_path):
    report = zoo.show("lora")
    assert (report.name, report.version, report.current, report.versions) == ("lora", 1, True, (1,))
    assert report.provenance["base"] == "base@1"
    assert set(report.files) == {
        "adapter_config.json", "config.json", "generation_config.json", "tokenizer.json",
    }  # fmt: skip
    assert json.loads(json.dumps(report.to_json()))["runs"][1]["applied"][0]["ranks"] == [4]
    zoo.register(write_checkpoint(tmp_path / "again", items=tensors(config(), seed=3)), name="base")
    assert (zoo.show("base@1").current, zoo.show("base").versions) == (False, (1, 2))


def test_diff_of_equal_variants(zoo, tmp_path):
    zoo.register(tmp_path / "base", name="copy")
    report = zoo.diff("base", "copy")
    assert (report.equal, report.adapters, report.different, report.changed_bytes) == (5, 0, 0, 0)
    assert report.files == ()


def test_diff_of_tuned_layers(zoo):
    report = zoo.diff("base", "tuned")
    assert (report.a, report.b) == ("base@1", "tuned@1")
    assert [link.status for link in report.links] == ["equal", "equal", "equal", "different", "equal"]
    (changed,) = report.links[3].tensors
    expected = len(tensors(config())[TUNED].data)
    assert (changed.name, changed.bytes_a, changed.bytes_b, changed.changed_bytes) == (
        "mlp.up_proj.weight", expected, expected, expected,
    )  # fmt: skip
    assert report.changed_bytes == expected


def test_diff_of_adapters(zoo, tmp_path):
    report = zoo.diff("base", "lora")
    assert [link.status for link in report.links] == ["equal", *["adapters"] * 3, "equal"]
    assert (report.adapters, report.different) == (3, 0)
    assert sum(link.applied_bytes_b for link in report.links) == size(adapter_tensors(config()))
    assert report.files == ("adapter_config.json",)


def test_diff_counts_only_the_chunks_that_changed(tmp_path):
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    values = config(vocab_size=9000)
    items = tensors(values)
    zoo.register(write_checkpoint(tmp_path / "a", values, items), name="a")
    name = "model.embed_tokens.weight"
    items[name] = type(items[name])("BF16", (9000, 16), items[name].data[:-2] + b"\0\0")
    zoo.register(write_checkpoint(tmp_path / "b", values, items), name="b")
    report = zoo.diff("a", "b")
    last_chunk = (9000 - 2 * 4096) * 32
    assert [tensor.changed_bytes for link in report.links for tensor in link.tensors] == [last_chunk] * 2
    assert report.changed_bytes == 2 * last_chunk


def test_diff_of_other_depths(zoo, tmp_path):
    values = config(num_hidden_layers=2)
    zoo.register(write_checkpoint(tmp_path / "short", values), name="short")
    assert [link.status for link in zoo.diff("base", "short").links][-2:] == ["only in A", "equal"]
    report = zoo.diff("short", "base")
    assert [link.status for link in report.links] == ["equal", "equal", "equal", "only in B", "equal"]
    assert report.changed_bytes == zoo.block(zoo.chain(zoo.resolve("base").chain).links[3].base).num_bytes


def test_private_heads_of_adapters(zoo, tmp_path):
    items = {**adapter_tensors(config()), "base_model.model.lm_head.weight": tensor((40, 16), seed=4)}
    path = write_adapter(tmp_path / "head", adapter_config(modules_to_save=["lm_head"]), items)
    zoo.register(path, name="head", base="base")
    assert zoo.show("head").draw().endswith("-> [head]")
    assert zoo.diff("base", "head").links[-1].status == "different"


def test_json_reports_nest():
    @dataclass(frozen=True, slots=True)
    class Inner(JsonReport):
        path: Path

    @dataclass(frozen=True, slots=True)
    class Outer(JsonReport):
        items: tuple[Inner, ...]
        names: frozenset[str]
        table: dict[str, Inner]

    inner = Inner(Path("a/b"))
    assert Outer((inner,), frozenset({"x"}), {"k": inner}).to_json() == {
        "items": [{"path": "a/b"}], "names": ["x"], "table": {"k": {"path": "a/b"}},
    }  # fmt: skip


def damage(tmp_path, name, version=1):
    (tmp_path / "zoo" / "refs" / "variants" / name / str(version)).write_bytes(b"{}")


def test_a_damaged_ref_hides_no_other_variant(zoo, tmp_path):
    whole = {row.name: row for row in zoo.ls()}
    damage(tmp_path, "tuned")
    rows = {row.name: row for row in zoo.ls()}
    assert [row.kind for row in rows.values()] == ["checkpoint", "adapter", "damaged"]
    assert rows["lora"] == whole["lora"]
    assert (rows["tuned"].version, rows["tuned"].chain) == (1, "")
    assert zoo.show("lora").name == "lora"
    assert {row.name for row in zoo.du().rows} == {"base", "lora"}
    assert zoo.du().unreachable_bytes == 0
    with pytest.raises(CorruptManifestError, match="damaged"):
        zoo.resolve("tuned")
    with pytest.raises(VariantNotFoundError):
        zoo.resolve("tunes")
    with pytest.raises(CorruptManifestError):
        zoo.gc(grace_s=0)


def test_a_damaged_manifest_hides_no_other_variant(zoo, tmp_path):
    zoo.store.storage.replace(layout.chain_key(zoo.resolve("tuned").chain), [b"{}"])
    fresh = Zoo.open(tmp_path / "zoo")
    assert {row.name: row.kind for row in fresh.ls()} == {
        "base": "checkpoint",
        "lora": "adapter",
        "tuned": "damaged",
    }
    assert fresh.show("base").name == "base"


def test_a_damaged_old_version_leaves_the_current_one_alone(zoo, tmp_path):
    zoo.register(tmp_path / "tuned", name="lora")
    damage(tmp_path, "lora")
    row = next(row for row in zoo.ls() if row.name == "lora")
    assert (row.version, row.kind) == (2, "checkpoint")
    assert zoo.resolve("lora@2").version == zoo.resolve("lora").version == 2
    with pytest.raises(CorruptManifestError):
        zoo.resolve("lora@1")
    assert zoo.rm("lora").removed == (1, 2)
