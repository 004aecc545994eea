"""Manifests that were pushed are accepted exactly when registering their files makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from blockzoo.errors import BlockzooError, InvalidManifestError, TensorMismatchError
from blockzoo.folders.contents import LAYOUT_FILE, FolderLayout, InBlock
from blockzoo.manifest import BlockManifest, FileRef, Link, TensorRef
from blockzoo.registering.recheck import Pushed, recheck
from blockzoo.store.blobs import file_data
from blockzoo.store.writing import ManifestRecorder
from blockzoo.zoo import Zoo
from support.folders import config, tensors, write_adapter, write_checkpoint

BlockChange = Callable[[BlockManifest], BlockManifest]


@dataclass
class Bench:
    """A registered variant as if it had been pushed, and ways to change it."""

    zoo: Zoo
    pushed: Pushed

    def check(self) -> dict[str, str]:
        return recheck(self.zoo.store, self.pushed)

    def with_block(
        self, position: int, change: Callable[[BlockManifest], BlockManifest], applied: bool = False
    ) -> Pushed:
        """Change one block, and the chain to name it."""
        chain = self.pushed.chain
        link = chain.links[position]
        old = link.applied[0] if applied else link.base
        block = change(self.pushed.blocks[old])
        (new,) = ManifestRecorder().put_blocks([block])
        changed = Link(link.base, (new,)) if applied else Link(new, link.applied)
        links = tuple(changed if i == position else item for i, item in enumerate(chain.links))
        return replace(
            self.pushed, chain=replace(chain, links=links), blocks={**self.pushed.blocks, new: block}
        )

    def with_file(self, name: str, data: bytes) -> Pushed:
        with self.zoo.store.registration("test") as registration:
            blob = registration.put_tensors([file_data(data)])[0].blob
        return replace(self.pushed, files={**self.pushed.files, name: FileRef(blob, len(data))})

    def layout(self) -> FolderLayout:
        return FolderLayout.from_bytes(self.zoo.store.blobs.read(self.pushed.files[LAYOUT_FILE].blob))

    def with_layout(self, **changes: Any) -> Pushed:
        return self.with_file(LAYOUT_FILE, replace(self.layout(), **changes).to_bytes())


def bench(zoo: Zoo, name: str, base: str | None) -> Bench:
    record = zoo.resolve(name)
    chain = zoo.chain(record.chain)
    blocks = {block: zoo.block(block) for link in chain.links for block in (link.base, *link.applied)}
    based = None if base is None else zoo.resolve(base)
    return Bench(zoo, Pushed(record.kind, chain, blocks, record.files, based))


@pytest.fixture
def zoo(tmp_path):
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(write_checkpoint(tmp_path / "base"), name="base")
    values = config(tie_word_embeddings=False, vocab_size=5000)
    zoo.register(write_checkpoint(tmp_path / "wide", values, tensors(values), shards=3), name="wide")
    zoo.register(write_adapter(tmp_path / "adapter"), name="bot", base="base")
    return zoo


@pytest.fixture
def base(zoo):
    return bench(zoo, "base", None)


@pytest.fixture
def bot(zoo):
    return bench(zoo, "bot", "base")


def test_what_registering_made_is_accepted(zoo, base, bot):
    assert base.check().keys() == {"num_bytes", "architecture"}
    assert bot.check() == {"num_bytes": zoo.resolve("bot").provenance["num_bytes"], "base": "base@1"}
    assert bench(zoo, "wide", None).check()["architecture"] == "LlamaForCausalLM"


def swap(a: str, b: str) -> BlockChange:
    """Exchange two tensors of a block."""

    def change(block: BlockManifest) -> BlockManifest:
        return replace(block, tensors={**block.tensors, a: block.tensors[b], b: block.tensors[a]})

    return change


def configured(**changes: Any) -> BlockChange:
    """Change the config of a block."""
    return lambda block: replace(block, config={**block.config, **changes})


def without(name: str) -> BlockChange:
    """Leave a tensor out."""
    return lambda block: replace(
        block, tensors={key: ref for key, ref in block.tensors.items() if key != name}
    )


def reshaped(name: str, **changes: Any) -> BlockChange:
    """Refer to a tensor with another shape, type or cut."""
    return lambda block: replace(
        block, tensors={**block.tensors, name: replace(block.tensors[name], **changes)}
    )


BLOCKS = {
    "another epsilon": (1, configured(norm_eps="0.5")),
    "more heads": (1, configured(num_heads=8)),
    "not tied": (4, configured(tied=False)),
    "another vocabulary": (0, configured(vocab_size=41)),
    "another kind": (1, lambda block: replace(block, kind="delta")),
    "another family": (1, lambda block: replace(block, family="qwen2")),
    "a tensor left out": (1, without("self_attn.q_proj.weight")),
    "a shape of as many bytes": (1, reshaped("self_attn.k_proj.weight", shape=(16, 8))),
    "a tensor in rows": (1, reshaped("mlp.up_proj.weight", chunk_rows=24)),
    "one more tensor": (
        1,
        lambda block: replace(
            block, tensors={**block.tensors, "extra": block.tensors["self_attn.q_proj.weight"]}
        ),
    ),
}


@pytest.mark.parametrize("change", sorted(BLOCKS))
def test_a_block_that_the_config_does_not_make_is_refused(base, change):
    base.pushed = base.with_block(*BLOCKS[change])
    with pytest.raises(InvalidManifestError):
        base.check()


def test_tensors_of_equal_shape_can_only_be_exchanged_with_their_bytes(base):
    """Which bytes a tensor has is the pusher's to say: this is another checkpoint, and a right one."""
    before = base.pushed.chain
    base.pushed = base.with_block(1, swap("self_attn.k_proj.weight", "self_attn.v_proj.weight"))
    assert base.check()
    assert base.pushed.chain != before
    base.pushed = base.with_block(1, swap("self_attn.q_proj.weight", "mlp.up_proj.weight"))
    with pytest.raises(InvalidManifestError):
        base.check()


@pytest.mark.parametrize(
    "change",
    [
        lambda chain: replace(chain, context_length=1 << 20),
        lambda chain: replace(chain, vocab_size=41),
        lambda chain: replace(chain, links=chain.links[:-1]),
        lambda chain: replace(chain, links=chain.links[::-1]),
        lambda chain: replace(chain, links=(*chain.links, chain.links[-1])),
        lambda chain: replace(chain, links=()),
        lambda chain: replace(
            chain, links=(Link(chain.links[0].base, (chain.links[1].base,)), *chain.links[1:])
        ),
    ],
)
def test_a_chain_that_the_config_does_not_make_is_refused(base, change):
    base.pushed = replace(base.pushed, chain=change(base.pushed.chain))
    with pytest.raises(InvalidManifestError):
        base.check()


@pytest.mark.parametrize("name", ["config.json", LAYOUT_FILE, "tokenizer.json"])
def test_files_cannot_be_left_out(base, name):
    base.pushed = replace(
        base.pushed, files={key: ref for key, ref in base.pushed.files.items() if key != name}
    )
    with pytest.raises(InvalidManifestError, match="file"):
        base.check()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("run.py", b"print()"),
        (".blockzoo/tensors/7", b"x"),
        ("config.json", b"{}"),
        ("config.json", b"not json"),
        ("config.json", b'{"architectures": ["MambaForCausalLM"]}'),
        ("tokenizer.json", b"{"),
        (LAYOUT_FILE, b"{}"),
        (LAYOUT_FILE, b"\xff"),
    ],
)
def test_files_that_no_folder_could_have_are_refused(base, name, data):
    base.pushed = base.with_file(name, data)
    with pytest.raises(BlockzooError) as caught:
        base.check()
    assert caught.value.reason != "INTERNAL"


def test_a_file_has_the_size_it_says(base):
    ref = base.pushed.files["config.json"]
    base.pushed = replace(base.pushed, files={**base.pushed.files, "config.json": replace(ref, size=1)})
    with pytest.raises(InvalidManifestError, match=r"config\.json"):
        base.check()


def test_a_layout_that_lies_is_refused(base):
    layout = base.layout()
    name = "model.norm.weight"
    moved = {**layout.tensors, name: InBlock(1, None, "input_layernorm.weight")}
    lost = {key: place for key, place in layout.tensors.items() if key != name}
    for changes in (
        {"tensors": moved},
        {"tensors": lost},
        {"tensors": {**layout.tensors, "more": InBlock(0, None, "weight")}},
        {"tensors": {**layout.tensors, name: InBlock(99, None, "norm.weight")}},
        {"tensors": {**layout.tensors, name: InBlock(-1, None, "norm.weight")}},
        {"shards": {"../model.safetensors": next(iter(layout.shards.values()))}},
        {"shards": {"a/model.safetensors": next(iter(layout.shards.values()))}},
        {"shards": {"model.safetensors": "{}"}},
        {"filenames": (*layout.filenames, "vocab.json")},
    ):
        pushed = base.with_layout(**changes)
        with pytest.raises(BlockzooError) as caught:
            recheck(base.zoo.store, pushed)
        assert caught.value.reason != "INTERNAL"


def test_a_header_of_another_type_is_refused(base):
    (file, header), *_ = base.layout().shards.items()
    base.pushed = base.with_layout(shards={file: header.replace('"BF16"', '"F16"')})
    with pytest.raises(InvalidManifestError, match="header"):
        base.check()


ADAPTER_BLOCKS = {
    "a larger scale": configured(
        modules={
            "self_attn.q_proj": {"rank": 4, "scale": "9.0"},
            "self_attn.v_proj": {"rank": 4, "scale": "2.0"},
        }
    ),
    "another target": configured(target="head"),
    "a matrix left out": without("self_attn.q_proj.lora_B"),
    "matrices exchanged": swap("self_attn.q_proj.lora_A", "self_attn.q_proj.lora_B"),
}


@pytest.mark.parametrize("change", sorted(ADAPTER_BLOCKS))
def test_an_adapter_block_that_its_config_does_not_make_is_refused(bot, change):
    bot.pushed = bot.with_block(2, ADAPTER_BLOCKS[change], applied=True)
    with pytest.raises(InvalidManifestError):
        bot.check()


def test_an_adapter_goes_on_its_base_and_on_no_other(zoo, bot):
    with pytest.raises(InvalidManifestError, match="does not name the base"):
        recheck(zoo.store, replace(bot.pushed, base=None))
    with pytest.raises(BlockzooError):
        recheck(zoo.store, replace(bot.pushed, base=zoo.resolve("wide")))
    with pytest.raises(BlockzooError, match="adapters on adapters"):
        recheck(zoo.store, replace(bot.pushed, base=zoo.resolve("bot")))
    with pytest.raises(TensorMismatchError):
        recheck(zoo.store, replace(bot.pushed, kind="checkpoint"))
    with pytest.raises(InvalidManifestError):
        recheck(zoo.store, replace(bot.pushed, kind="tombstone"))


def test_files_inherited_from_the_base_are_the_bases(bot):
    changed = bot.with_file("tokenizer.json", b'{"model": {"evil": 1}}')
    with pytest.raises(InvalidManifestError, match=r"tokenizer\.json"):
        recheck(bot.zoo.store, changed)


def test_a_tensor_of_the_wrong_blobs_is_refused(zoo, base):
    """The manifest keeps shape and type; the blob behind it has others."""
    block = base.pushed.blocks[base.pushed.chain.links[1].base]
    small = block.tensors["input_layernorm.weight"].blobs

    def change(block: BlockManifest) -> BlockManifest:
        ref = block.tensors["self_attn.q_proj.weight"]
        wrong = TensorRef(ref.dtype, ref.shape, small)
        return replace(block, tensors={**block.tensors, "self_attn.q_proj.weight": wrong})

    base.pushed = base.with_block(1, change)
    with pytest.raises(InvalidManifestError, match="is not part of tensor"):
        base.check()
