"""Adapters that are more than LoRA on linear modules: their blocks, pushes, exports, and what is shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from blockserve.cli.views.zoo import draw_variant
from blockzoo.errors import InvalidConfigError, InvalidManifestError
from blockzoo.evaluation.forward import LinkLoader, Windows
from blockzoo.manifest import BlockManifest, JsonValue
from blockzoo.registering.recheck import Pushed, recheck
from blockzoo.store.writing import ManifestRecorder
from blockzoo.zoo import Zoo
from support.adapters import FURTHER_METHODS, randomise_adapter
from support.oracle import LOGITS_TOLERANCE, logits_error
from support.variants import Variant, VariantFactory

pytestmark = pytest.mark.filterwarnings("ignore")
BASES = ["llama-gqa", "llama-gqa-tied"]
ON_ENDS = {
    "tokens": ("embedding", {"tokens"}),
    "embedding": ("embedding", {"rank", "scale"}),
    "dora-ends": ("embedding", {"rank", "scale", "magnitude"}),
}


def made(zoo: Zoo, factory: VariantFactory, base: str, name: str) -> Variant:
    """A base and an adapter on it, registered."""
    checkpoint = factory.checkpoint(base)
    adapter = factory.adapter(checkpoint, name, spec=FURTHER_METHODS[name])
    zoo.register(checkpoint.path, name="base")
    zoo.register(adapter.path, name="a", base="base")
    return adapter


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    return Zoo.open(tmp_path / "zoo", create=True)


def pushed(zoo: Zoo) -> Pushed:
    record = zoo.resolve("a")
    chain = zoo.chain(record.chain)
    blocks = {block: zoo.block(block) for link in chain.links for block in (link.base, *link.applied)}
    return Pushed(record.kind, chain, blocks, record.files, zoo.resolve("base"))


@pytest.mark.parametrize("name", FURTHER_METHODS)
def test_a_push_is_accepted_and_the_export_has_the_same_bytes(
    zoo: Zoo, tmp_path: Path, factory: VariantFactory, name: str
) -> None:
    adapter = made(zoo, factory, "llama-gqa-tied", name)
    assert recheck(zoo.store, pushed(zoo))["base"] == "base@1"
    plain, adapted = (zoo.chain(zoo.resolve(one).chain).links for one in ("base", "a"))
    assert [link.base for link in plain] == [link.base for link in adapted]
    out = zoo.export("a", tmp_path / "out").path
    files = sorted(path.name for path in adapter.path.glob("adapter_*"))
    assert len(files) == 2
    for file in files:
        assert (out / file).read_bytes() == (adapter.path / file).read_bytes()


@pytest.mark.parametrize("name", ON_ENDS)
def test_programs_that_know_only_lora_do_not_find_their_modules(
    zoo: Zoo, factory: VariantFactory, name: str
) -> None:
    """They look under "modules", and refuse a block without."""
    made(zoo, factory, "llama-gqa-tied", name)
    (applied,) = zoo.chain(zoo.resolve("a").chain).links[0].applied
    block = zoo.block(applied)
    assert block.config.keys() == {"target", "changes"}
    target, keys = ON_ENDS[name]
    changes = block.config["changes"]
    assert isinstance(changes, dict)
    change = changes["embed_tokens"]
    assert isinstance(change, dict)
    assert (block.config["target"], change.keys()) == (target, keys)


def test_a_pushed_block_that_changes_other_tokens_is_refused(zoo: Zoo, factory: VariantFactory) -> None:
    made(zoo, factory, "llama-gqa", "tokens")
    claimed = pushed(zoo)
    link = claimed.chain.links[0]
    block = claimed.blocks[link.applied[0]]
    tokens = [*range(401, 1, -3)]
    other = replace(block, config={**block.config, "changes": {"embed_tokens": {"tokens": tokens}}})  # type: ignore[dict-item]
    (new,) = ManifestRecorder().put_blocks([other])
    links = (replace(link, applied=(new,)), *claimed.chain.links[1:])
    chain = replace(claimed.chain, links=links)
    with pytest.raises(InvalidManifestError):
        recheck(zoo.store, replace(claimed, chain=chain, blocks={**claimed.blocks, new: other}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"surprise": True}, "surprise"),
        ({"scale": "wide"}, "settings"),
    ],
)
def test_what_this_version_does_not_know_is_refused(
    zoo: Zoo, factory: VariantFactory, change: dict[str, JsonValue], words: str
) -> None:
    made(zoo, factory, "llama-gqa", "embedding")
    link = zoo.chain(zoo.resolve("a").chain).links[0]
    block, base = zoo.block(link.applied[0]), zoo.block(link.base)
    reader = LinkLoader(zoo, torch.float32, torch.device("cpu"))._reader
    assert reader.changes(block, base).embedding is not None
    for key in ("changes", "modules"):
        settings = {"rank": 3, "scale": "1.0", **change}
        later: BlockManifest = replace(block, config={"target": "embedding", key: {"embed_tokens": settings}})  # type: ignore[dict-item]
        with pytest.raises(InvalidConfigError, match=words):
            reader.changes(later, base)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dora", "adapter rank 4 with DoRA on"),
        ("biases", "adapter rank 4 with biases on"),
        ("tokens", "adapter with 134 trained tokens on embed_tokens"),
        ("embedding", "adapter rank 3 on embed_tokens"),
    ],
)
def test_show_says_what_an_adapter_does(zoo: Zoo, factory: VariantFactory, name: str, words: str) -> None:
    made(zoo, factory, "llama-gqa", name)
    assert words in "\n".join(draw_variant(zoo.show("a"), None))


@pytest.mark.parametrize("base", BASES)
def test_tokens_that_were_added_and_trained(
    zoo: Zoo, tmp_path: Path, factory: VariantFactory, base: str
) -> None:
    """PEFT saves the resized matrices with them, those of a tied model and its new rows twice."""
    path = factory.checkpoint(base).path
    model = LlamaForCausalLM.from_pretrained(path)
    vocab = model.config.vocab_size + 5
    model.resize_token_embeddings(vocab, mean_resizing=False)
    options = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj"],
        trainable_token_indices=[3, vocab - 1, vocab - 2],
    )
    wrapped = get_peft_model(model, options).eval()
    randomise_adapter(wrapped, 1)
    wrapped.save_pretrained(tmp_path / "adapter")
    names = [
        name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "delta" in name
    ]
    assert len(names) == (2 if "tied" in base else 1)
    zoo.register(path, name="base")
    zoo.register(tmp_path / "adapter", name="a", base="base")
    assert recheck(zoo.store, pushed(zoo))["base"] == "base@1"
    ids = [3, vocab - 1, 7, vocab - 2, vocab - 3]
    loader = LinkLoader(zoo, torch.float32, torch.device("cpu"))
    links = loader.load(zoo.chain(zoo.resolve("a").chain).links)
    window = Windows([ids], loader)
    with torch.inference_mode():
        ours = window.logits(links[-1], window.run(links[:-1], window.token_ids))
        theirs = wrapped(torch.tensor([ids])).logits[0]
    assert logits_error(ours, theirs) <= LOGITS_TOLERANCE
