import json
from pathlib import Path

import numpy as np
import pytest

from blockzoo.errors import InvalidNameError, TensorMismatchError, VariantNotFoundError
from blockzoo.folders.contents import LAYOUT_FILE
from blockzoo.manifest import BlockKind, DType
from blockzoo.registering.recheck import Pushed, recheck
from blockzoo.zoo import Zoo
from support.folders import (
    ARCHITECTURES,
    LAYERS,
    Raw,
    config,
    safetensors_bytes,
    shapes,
    tensor,
    tensors,
    write_checkpoint,
)


@pytest.fixture
def zoo(tmp_path):
    return Zoo.open(tmp_path / "zoo", create=True)


def blocks_of(zoo, ref):
    return [zoo.block(link.base) for link in zoo.chain(zoo.resolve(ref).chain).links]


def stored(zoo, ref):
    """Checkpoint name -> bytes, read back through the manifests."""
    from blockzoo import families

    chain = zoo.chain(zoo.resolve(ref).chain)
    family = families.get(chain.family)
    return {
        family.source_name(position, len(chain.links) - 2, name): b"".join(zoo.read_tensor(item))
        for position, block in enumerate(blocks_of(zoo, ref))
        for name, item in block.tensors.items()
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_tensor_is_in_its_place(zoo, tmp_path, architecture, tied, dtype):
    values = config(architecture, tie_word_embeddings=tied)
    items = tensors(values, dtype=dtype)
    zoo.register(write_checkpoint(tmp_path / "a", values, items), name="a")
    expected = {name: item.data for name, item in items.items()}
    expected.setdefault("lm_head.weight", items["model.embed_tokens.weight"].data)
    assert stored(zoo, "a") == expected
    blocks = blocks_of(zoo, "a")
    assert [block.kind for block in blocks] == [
        BlockKind.EMBEDDING,
        *[BlockKind.LAYER] * LAYERS,
        BlockKind.HEAD,
    ]
    assert {block.family for block in blocks} == {architecture.removesuffix("ForCausalLM").lower()}
    assert blocks[-1].config["tied"] is tied
    assert {item.dtype for block in blocks for item in block.tensors.values()} == {DType(dtype)}


def test_result_and_record(zoo, tmp_path):
    path = write_checkpoint(tmp_path / "a", shards=2)
    result = zoo.register(path, name="a")
    record = zoo.resolve("a")
    assert result.record == record
    assert (record.version, record.kind, result.unchanged) == (1, "checkpoint", False)
    assert set(record.files) == {
        "config.json", "model.safetensors.index.json", "tokenizer.json",
        "generation_config.json", LAYOUT_FILE,
    }  # fmt: skip
    assert record.provenance["architecture"] == "LlamaForCausalLM"
    assert record.provenance["source"] == str(path)
    assert result.num_bytes == sum(len(item.data) for item in tensors(config()).values())
    assert result.new_bytes > result.num_bytes
    assert json.loads(json.dumps(result.to_json()))["version"] == 1
    chain = zoo.chain(record.chain)
    assert (chain.family, chain.context_length, chain.vocab_size) == ("llama", 128, 40)


def test_the_same_folder_again_changes_nothing(zoo, tmp_path):
    path = write_checkpoint(tmp_path / "a")
    zoo.register(path, name="a")
    before = sorted((info.key, info.size) for info in zoo.store.storage.list(""))
    again = zoo.register(path, name="a")
    assert again.unchanged
    assert (again.record.version, again.num_new_blobs, again.stored_bytes) == (1, 0, 0)
    assert sorted((info.key, info.size) for info in zoo.store.storage.list("")) == before


@pytest.mark.parametrize("changed", ["weights", "tokenizer", "template"])
def test_changed_contents_make_a_new_version_and_keep_the_old(zoo, tmp_path, changed):
    path = write_checkpoint(tmp_path / "a")
    first = zoo.register(path, name="a").record
    before = stored(zoo, "a")
    if changed == "weights":
        write_checkpoint(path, items=tensors(config(), seed=1))
    elif changed == "tokenizer":
        (path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    else:
        (path / "chat_template.jinja").write_text("{{ messages }}")
    second = zoo.register(path, name="a")
    assert (second.record.version, second.unchanged) == (2, False)
    assert (second.record.chain == first.chain) is (changed != "weights")
    assert zoo.resolve("a").version == 2
    assert stored(zoo, "a@1") == before


def test_going_back_makes_a_version_again(zoo, tmp_path):
    one, two = (
        write_checkpoint(tmp_path / "1"),
        write_checkpoint(tmp_path / "2", items=tensors(config(), seed=1)),
    )
    for path, version in ((one, 1), (two, 2), (one, 3), (one, 3)):
        assert zoo.register(path, name="a").record.version == version


def test_equal_checkpoints_share_everything(zoo, tmp_path):
    zoo.register(write_checkpoint(tmp_path / "a"), name="a")
    other = zoo.register(write_checkpoint(tmp_path / "b"), name="b")
    assert other.num_new_blobs == 0
    assert other.record.chain == zoo.resolve("a").chain


def test_sharding_does_not_change_the_chain(zoo, tmp_path):
    one = zoo.register(write_checkpoint(tmp_path / "a"), name="a").record
    many = zoo.register(write_checkpoint(tmp_path / "b", shards=4), name="b").record
    assert one.chain == many.chain


RENAMINGS = {
    "compiled": (lambda name: f"_orig_mod.{name}", "'_orig_mod.'"),
    "distributed": (lambda name: f"module.{name}", "'module.'"),
    "sharded": (lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module."), "fsdp"),
    "without the head": (lambda name: name.removeprefix("model."), "'model.' in front"),
}


@pytest.mark.parametrize("case", RENAMINGS)
@pytest.mark.parametrize("tied", [True, False])
def test_marks_of_wrappers_are_read_past_and_come_back(zoo, tmp_path, case, tied):
    rename, words = RENAMINGS[case]
    values = config(tie_word_embeddings=tied)
    items = tensors(values)
    plain = zoo.register(write_checkpoint(tmp_path / "a", values, items), name="a").record
    marked = write_checkpoint(tmp_path / "b", values, {rename(name): item for name, item in items.items()})
    record = zoo.register(marked, name="b").record
    assert record.chain == plain.chain
    assert words in record.provenance["notes"]
    assert "notes" not in plain.provenance
    assert recheck(zoo.store, pushed(zoo, "b"))["notes"] == record.provenance["notes"]
    out = Path(zoo.export("b", tmp_path / "out").path)
    assert (out / "model.safetensors").read_bytes() == (marked / "model.safetensors").read_bytes()


def test_names_that_would_be_equal_without_marks_are_refused(zoo, tmp_path):
    items = tensors(config())
    items["_orig_mod.model.norm.weight"] = items["model.norm.weight"]
    with pytest.raises(TensorMismatchError, match="two tensors are"):
        zoo.register(write_checkpoint(tmp_path / "a", items=items), name="a")


def test_a_tensor_may_be_in_several_shards_with_equal_bytes(zoo, tmp_path):
    one = zoo.register(write_checkpoint(tmp_path / "a"), name="a").record
    path = write_checkpoint(tmp_path / "b", shards=2)
    shards = sorted(path.glob("*.safetensors"))
    items = tensors(config())
    index = json.loads((path / "model.safetensors.index.json").read_text())
    names = [name for name in items if index["weight_map"][name] == shards[1].name]
    shards[1].write_bytes(safetensors_bytes({name: items[name] for name in [*names, "model.norm.weight"]}))
    assert index["weight_map"]["model.norm.weight"] == shards[0].name
    record = zoo.register(path, name="b").record
    assert record.chain == one.chain
    recheck(zoo.store, pushed(zoo, "b"))
    out = Path(zoo.export("b", tmp_path / "out").path)
    for shard in shards:
        assert (out / shard.name).read_bytes() == shard.read_bytes()


def pushed(zoo, ref):
    record = zoo.resolve(ref)
    chain = zoo.chain(record.chain)
    blocks = {link.base: zoo.block(link.base) for link in chain.links}
    return Pushed(record.kind, chain, blocks, record.files, None)


def test_tuned_layers_are_the_only_private_ones(zoo, tmp_path):
    items = tensors(config())
    zoo.register(write_checkpoint(tmp_path / "a", items=items), name="a")
    name = "model.layers.2.mlp.up_proj.weight"
    tuned = {**items, name: tensor(items[name].shape, seed="tuned")}
    result = zoo.register(write_checkpoint(tmp_path / "b", items=tuned), name="b")
    links = zip(*(zoo.chain(zoo.resolve(ref).chain).links for ref in ("a", "b")), strict=True)
    assert [one == two for one, two in links] == [True, True, True, False, True]
    # The tensor, and the layout file, which is equal: the header did not change.
    assert (result.num_new_blobs, result.new_bytes) == (1, len(items[name].data))


def test_equal_layers_of_one_checkpoint_are_one_block(zoo, tmp_path):
    items = tensors(config())
    for name in list(items):
        if name.startswith("model.layers."):
            items[name] = items[name.replace(name.split(".")[2], "0", 1)]
    zoo.register(write_checkpoint(tmp_path / "a", items=items), name="a")
    links = zoo.chain(zoo.resolve("a").chain).links
    assert len({link.base for link in links[1:-1]}) == 1
    assert len(set(links)) == 3


def test_sliding_window_makes_another_layer_of_the_same_blobs(zoo, tmp_path):
    values = config("Qwen2ForCausalLM", sliding_window=16)
    zoo.register(write_checkpoint(tmp_path / "a", values), name="a")
    values |= {"use_sliding_window": True, "max_window_layers": 1}
    result = zoo.register(write_checkpoint(tmp_path / "b", values), name="b")
    links = zip(*(zoo.chain(zoo.resolve(ref).chain).links for ref in ("a", "b")), strict=True)
    assert [one == two for one, two in links] == [True, True, False, False, True]
    assert result.num_new_blobs == 1  # config.json


VOCAB = 9000


def big_vocabulary(vocab=VOCAB, **changes):
    values = config(vocab_size=vocab, num_hidden_layers=1, **changes)
    return values, tensors(values)


def test_embedding_and_head_are_cut_into_rows(zoo, tmp_path):
    values, items = big_vocabulary(tie_word_embeddings=False)
    zoo.register(write_checkpoint(tmp_path / "a", values, items), name="a")
    blocks = blocks_of(zoo, "a")
    for block, name in ((blocks[0], "weight"), (blocks[-1], "lm_head.weight")):
        ref = block.tensors[name]
        assert (ref.shape, ref.chunk_rows, len(ref.blobs)) == ((VOCAB, 16), 4096, 3)
        assert [piece.nbytes for piece in zoo.read_tensor(ref)] == [4096 * 32, 4096 * 32, 808 * 32]
    assert stored(zoo, "a")["lm_head.weight"] == items["lm_head.weight"].data


def test_added_vocabulary_rows_share_the_rest(zoo, tmp_path):
    values, items = big_vocabulary()
    zoo.register(write_checkpoint(tmp_path / "a", values, items), name="a")
    old = items["model.embed_tokens.weight"]
    more = tensor((7, 16), seed="more")
    grown = {**items, "model.embed_tokens.weight": Raw("BF16", (VOCAB + 7, 16), old.data + more.data)}
    zoo.register(write_checkpoint(tmp_path / "b", {**values, "vocab_size": VOCAB + 7}, grown), name="b")
    a, b = (blocks_of(zoo, ref)[0].tensors["weight"].blobs for ref in "ab")
    assert a[:2] == b[:2]
    assert a[2] != b[2]
    links = zip(*(zoo.chain(zoo.resolve(ref).chain).links for ref in "ab"), strict=True)
    assert [one == two for one, two in links] == [False, True, False]
    assert zoo.chain(zoo.resolve("b").chain).vocab_size == VOCAB + 7


def test_tied_head_references_the_blobs_of_the_embedding(zoo, tmp_path):
    values, items = big_vocabulary()
    zoo.register(write_checkpoint(tmp_path / "a", values, items), name="a")
    blocks = blocks_of(zoo, "a")
    assert blocks[0].tensors["weight"] == blocks[-1].tensors["lm_head.weight"]
    assert blocks[-1].config["tied"] is True


TIED = {
    "only the embedding": ("embed",),
    "only the head": ("head",),
    "both, equal": ("embed", "same"),
    "both, different": ("embed", "head"),
}


@pytest.mark.parametrize("name", TIED)
def test_tied_config_with_either_matrix(zoo, tmp_path, name):
    values = config(tie_word_embeddings=True)
    items = tensors(values)
    embed = items.pop("model.embed_tokens.weight")
    if "embed" in TIED[name]:
        items["model.embed_tokens.weight"] = embed
    if "head" in TIED[name]:
        items["lm_head.weight"] = tensor(embed.shape, seed="head")
    if "same" in TIED[name]:
        items["lm_head.weight"] = embed
    zoo.register(write_checkpoint(tmp_path / "a", values, items), name="a")
    read, tied = stored(zoo, "a"), blocks_of(zoo, "a")[-1].config["tied"]
    assert tied is (name != "both, different")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert read[key] == items.get(key, next(iter(items.get(other) for other in (
            "model.embed_tokens.weight", "lm_head.weight") if other in items))).data  # fmt: skip


def test_untied_config_needs_the_head(zoo, tmp_path):
    values = config(tie_word_embeddings=False)
    items = tensors(config(tie_word_embeddings=True))
    with pytest.raises(TensorMismatchError, match="lm_head"):
        zoo.register(write_checkpoint(tmp_path / "a", values, items), name="a")


def test_types_may_differ_between_tensors(zoo, tmp_path):
    items = tensors(config())
    for name in list(items):
        if "norm" in name:
            items[name] = tensor(items[name].shape, seed=name[-20:], dtype="F32")
    zoo.register(write_checkpoint(tmp_path / "a", items=items), name="a")
    assert stored(zoo, "a")["model.norm.weight"] == items["model.norm.weight"].data


def test_rotary_frequencies_are_kept_but_in_no_block(zoo, tmp_path):
    items = tensors(config())
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    items[name] = tensor((2,), dtype="F32")
    result = zoo.register(write_checkpoint(tmp_path / "a", items=items), name="a")
    assert result.ignored == (name,)
    assert result.record.chain == zoo.register(write_checkpoint(tmp_path / "b"), name="b").record.chain


def nudged(item: Raw, step: int) -> Raw:
    """Change every value by a unit in the last place or so, as training does."""
    bits = np.frombuffer(item.data, "<u2").copy()
    bits[::3] += step
    return Raw(item.dtype, item.shape, bits.tobytes())


def wide():
    values = config(hidden_size=64, intermediate_size=256, num_hidden_layers=2, vocab_size=5000)
    return values, tensors(values)


def test_differences_to_the_base_are_stored_where_smaller(zoo, tmp_path):
    values, items = wide()
    zoo.register(write_checkpoint(tmp_path / "a", values, items), name="a")
    tuned = {name: nudged(item, 1) if len(item.data) > 1000 else item for name, item in items.items()}
    result = zoo.register(write_checkpoint(tmp_path / "b", values, tuned), name="b", base="a")
    assert result.record.provenance["base"] == "a@1"
    assert result.stored_bytes < 0.5 * result.new_bytes
    assert {name: data for name, data in stored(zoo, "b").items() if name in tuned} == {
        name: item.data for name, item in tuned.items()
    }
    # A difference to a difference is not made: the third is again taken to the first.
    third = {name: nudged(item, 2) if len(item.data) > 1000 else item for name, item in items.items()}
    again = zoo.register(write_checkpoint(tmp_path / "c", values, third), name="c", base="b")
    assert again.stored_bytes < 0.5 * again.new_bytes
    assert stored(zoo, "c")["lm_head.weight"] == third["model.embed_tokens.weight"].data


def test_a_base_of_another_shape_is_no_help_and_no_harm(zoo, tmp_path):
    zoo.register(write_checkpoint(tmp_path / "a"), name="a")
    values, items = wide()
    zoo.register(write_checkpoint(tmp_path / "b", values, items), name="b", base="a")
    assert stored(zoo, "b")["model.norm.weight"] == items["model.norm.weight"].data


def test_unknown_base_and_bad_names(zoo, tmp_path):
    path = write_checkpoint(tmp_path / "a")
    with pytest.raises(VariantNotFoundError):
        zoo.register(path, name="b", base="nothing")
    for name in ("../x", "a/b", "", "a@1", ".hidden", "x" * 97):
        with pytest.raises(InvalidNameError):
            zoo.register(path, name=name)
    assert zoo.variants() == []


class Recorder:
    def __init__(self):
        self.tasks = []

    def start(self, task, total_bytes):
        self.tasks.append([task, total_bytes, 0, False])

    def advance(self, num_bytes):
        self.tasks[-1][2] += num_bytes

    def finish(self):
        self.tasks[-1][3] = True


def test_progress_reaches_its_total(zoo, tmp_path):
    recorder = Recorder()
    result = zoo.register(write_checkpoint(tmp_path / "a", shards=2), name="a", progress=recorder)
    assert [task for task, *_ in recorder.tasks] == ["checking weights", "storing"]
    files = sum(path.stat().st_size for path in (tmp_path / "a").glob("*.json"))
    assert [total for _, total, *_ in recorder.tasks] == [result.num_bytes, result.num_bytes + files]
    for _, total, done, finished in recorder.tasks:
        assert done == total
        assert finished


def test_ctrl_c_leaves_the_zoo_as_it_was(zoo, tmp_path):
    zoo.register(write_checkpoint(tmp_path / "a"), name="a")

    class Interrupts(Recorder):
        def advance(self, num_bytes):
            super().advance(num_bytes)
            if self.tasks[-1][0] == "storing":
                raise KeyboardInterrupt

    path = write_checkpoint(tmp_path / "b", items=tensors(config(), seed=5))
    with pytest.raises(KeyboardInterrupt):
        zoo.register(path, name="a", progress=Interrupts())
    assert [record.version for record in zoo.versions("a")] == [1]
    assert zoo.verify().ok
    assert list(zoo.store.storage.list("leases")) == []
    assert zoo.register(path, name="a").record.version == 2


def test_layers_of_another_depth_share(zoo, tmp_path):
    items = tensors(config())
    zoo.register(write_checkpoint(tmp_path / "a", items=items), name="a")
    shallow = config(num_hidden_layers=2)
    kept = {name: items[name] for name in shapes(shallow)}
    result = zoo.register(write_checkpoint(tmp_path / "b", shallow, kept), name="b")
    assert result.num_new_blobs == 2  # config.json and the layout
    a, b = (zoo.chain(zoo.resolve(ref).chain).links for ref in "ab")
    assert b == (*a[:3], a[-1])
