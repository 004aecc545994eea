import json

import pytest

from blockzoo.errors import (
    AdapterBaseMismatchError,
    AdapterError,
    UnknownTargetError,
    UnsupportedAdapterError,
    VariantNotFoundError,
)
from blockzoo.folders.contents import LAYOUT_FILE
from blockzoo.manifest import BlockKind
from blockzoo.zoo import Zoo
from support.folders import (
    LAYERS,
    VOCAB,
    adapter_config,
    adapter_tensors,
    config,
    tensor,
    tensors,
    write_adapter,
    write_checkpoint,
)

PREFIX = "base_model.model."
EMBED = f"{PREFIX}model.embed_tokens.weight"
HEAD = f"{PREFIX}lm_head.weight"


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture
def zoo(tmp_path, tied):
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    values = config(tie_word_embeddings=tied)
    zoo.register(write_checkpoint(tmp_path / "base", values), name="base")
    return zoo


def links_of(zoo, ref):
    return zoo.chain(zoo.resolve(ref).chain).links


def head_and_embedding(zoo, ref):
    links = links_of(zoo, ref)
    embedding, head = zoo.block(links[0].base), zoo.block(links[-1].base)
    return (
        b"".join(zoo.read_tensor(embedding.tensors["weight"])),
        b"".join(zoo.read_tensor(head.tensors["lm_head.weight"])),
    )


def test_one_adapter_block_on_each_touched_link(zoo, tmp_path):
    items = adapter_tensors(config())
    result = zoo.register(write_adapter(tmp_path / "a", items=items), name="a", base="base")
    assert (result.record.kind, result.record.provenance["base"]) == ("adapter", "base@1")
    base, links = links_of(zoo, "base"), links_of(zoo, "a")
    assert [link.base for link in links] == [link.base for link in base]
    assert [len(link.applied) for link in links] == [0, 1, 1, 1, 0]
    for index in range(LAYERS):
        block = zoo.block(links[index + 1].applied[0])
        assert (block.kind, block.family) == (BlockKind.ADAPTER, "llama")
        assert block.config == {
            "target": "layer",
            "modules": {
                "self_attn.q_proj": {"rank": 4, "scale": "2.0"},
                "self_attn.v_proj": {"rank": 4, "scale": "2.0"},
            },
        }
        assert set(block.tensors) == {
            f"self_attn.{name}.lora_{side}" for name in ("q_proj", "v_proj") for side in "AB"
        }
        for name, ref in block.tensors.items():
            source = f"{PREFIX}model.layers.{index}.{name}.weight"
            assert b"".join(zoo.read_tensor(ref)) == items[source].data
            assert ref.shape == items[source].shape


def test_files_of_the_base_come_along_and_own_ones_win(zoo, tmp_path):
    path = write_adapter(tmp_path / "a")
    (path / "chat_template.jinja").write_text("own")
    (path / "tokenizer.json").write_text('{"own": 1}')
    (path / "README.md").write_text("an adapter")
    zoo.register(path, name="a", base="base")
    record, base = zoo.resolve("a"), zoo.resolve("base")
    assert record.files["config.json"] == base.files["config.json"]
    assert zoo.read_file(record, "tokenizer.json") == b'{"own": 1}'
    assert zoo.read_file(record, "chat_template.jinja") == b"own"
    assert record.files[LAYOUT_FILE] != base.files[LAYOUT_FILE]
    assert zoo.read_file(record, "README.md") == b"an adapter"


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "nowhere", "null"])
def test_the_chat_template_is_the_adapters_in_whichever_file_it_is(zoo, tmp_path, where):
    """Read together, the base's chat_template.jinja would win over the adapter's tokenizer_config.json."""
    values = config()
    base = write_checkpoint(tmp_path / "templated", values, tensors(values))
    (base / "chat_template.jinja").write_text("the base's")
    zoo.register(base, name="templated")
    path = write_adapter(tmp_path / "a")
    template = {"tokenizer_config.json": {"chat_template": "its own"}, "null": {"chat_template": None}}
    (path / "tokenizer_config.json").write_text(json.dumps(template.get(where, {"pad_token": "x"})))
    if where == "chat_template.jinja":
        (path / where).write_text("its own")
    zoo.register(path, name="a", base="templated")
    record = zoo.resolve("a")
    if where == "tokenizer_config.json":
        assert "chat_template.jinja" not in record.files
    else:
        expected = b"its own" if where == "chat_template.jinja" else b"the base's"
        assert zoo.read_file(record, "chat_template.jinja") == expected


def test_equal_adapters_share_and_the_same_again_is_unchanged(zoo, tmp_path):
    path = write_adapter(tmp_path / "a")
    zoo.register(path, name="a", base="base")
    assert zoo.register(path, name="a", base="base").unchanged
    other = zoo.register(path, name="b", base="base")
    assert (other.num_new_blobs, other.record.chain) == (0, zoo.resolve("a").chain)


def test_adapter_stays_with_the_version_it_was_registered_on(zoo, tmp_path, tied):
    zoo.register(write_adapter(tmp_path / "a"), name="a", base="base")
    values = config(tie_word_embeddings=tied)
    zoo.register(write_checkpoint(tmp_path / "new", values, tensors(values, seed=9)), name="base")
    old = links_of(zoo, "base@1")
    assert [link.base for link in links_of(zoo, "a")] == [link.base for link in old]
    zoo.register(write_adapter(tmp_path / "a"), name="b", base="base@1")
    assert zoo.resolve("b").chain == zoo.resolve("a").chain


def test_rank_and_alpha_patterns_reach_the_block(zoo, tmp_path):
    modules = ("self_attn.q_proj", "mlp.down_proj")
    items = adapter_tensors(config(), modules)
    for name in list(items):
        if "layers.1." in name:
            shape = items[name].shape
            items[name] = tensor((3, shape[1]) if "lora_A" in name else (shape[0], 3), dtype="F32", seed=name)
    values = adapter_config(
        target_modules=["q_proj", "down_proj"],
        rank_pattern={r"layers\.1\..*": 3},
        alpha_pattern={"down_proj": 7},
        use_rslora=True,
    )
    zoo.register(write_adapter(tmp_path / "a", values, items), name="a", base="base")
    modules = [zoo.block(link.applied[0]).config["modules"] for link in links_of(zoo, "a")[1:-1]]
    assert modules[0] == {
        "self_attn.q_proj": {"rank": 4, "scale": "4.0"},
        "mlp.down_proj": {"rank": 4, "scale": "3.5"},
    }
    assert modules[1] == {
        "self_attn.q_proj": {"rank": 3, "scale": repr(8 / 3**0.5)},
        "mlp.down_proj": {"rank": 3, "scale": repr(7 / 3**0.5)},
    }


def head_adapter(rank=4, rows=VOCAB):
    return {
        f"{PREFIX}lm_head.lora_A.weight": tensor((rank, 16), dtype="F32"),
        f"{PREFIX}lm_head.lora_B.weight": tensor((rows, rank), dtype="F32"),
    }


def test_lora_on_the_head(zoo, tmp_path):
    values = adapter_config(target_modules=["lm_head"])
    zoo.register(write_adapter(tmp_path / "a", values, head_adapter()), name="a", base="base")
    links, base = links_of(zoo, "a"), links_of(zoo, "base")
    assert links[:-1] == base[:-1]
    block = zoo.block(links[-1].applied[0])
    assert block.config == {"target": "head", "modules": {"lm_head": {"rank": 4, "scale": "2.0"}}}
    assert set(block.tensors) == {"lm_head.lora_A", "lm_head.lora_B"}


def saved_matrix(seed="saved", rows=VOCAB):
    return tensor((rows, 16), seed=seed)


@pytest.mark.parametrize("names", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
def test_modules_to_save_replace_only_themselves(zoo, tmp_path, names):
    items = adapter_tensors(config())
    for name in names:
        items[EMBED if name == "embed_tokens" else HEAD] = saved_matrix(name)
    values = adapter_config(modules_to_save=list(names))
    zoo.register(write_adapter(tmp_path / "a", values, items), name="a", base="base")
    embed, head = head_and_embedding(zoo, "base")
    expected = (
        items[EMBED].data if EMBED in items else embed,
        items[HEAD].data if HEAD in items else head,
    )
    assert head_and_embedding(zoo, "a") == expected
    links, base = links_of(zoo, "a"), links_of(zoo, "base")
    assert (links[0].base == base[0].base) is (EMBED not in items)
    assert (links[-1].base == base[-1].base) is (HEAD not in items)


def test_saved_copies_of_the_bases_own_matrices_are_shared(zoo, tmp_path, tied):
    """PEFT saves the whole module, also where training has not changed it."""
    own = tensors(config(tie_word_embeddings=tied))
    embed = own["model.embed_tokens.weight"]
    items = {**adapter_tensors(config()), EMBED: embed, HEAD: own.get("lm_head.weight", embed)}
    values = adapter_config(modules_to_save=["embed_tokens", "lm_head"])
    zoo.register(write_adapter(tmp_path / "a", values, items), name="a", base="base")
    assert [link.base for link in links_of(zoo, "a")] == [link.base for link in links_of(zoo, "base")]


@pytest.mark.parametrize("key", [EMBED, HEAD])
def test_a_matrix_saved_beside_lora_goes_into_the_shared_one_of_a_tied_base(zoo, tmp_path, tied, key):
    items = {**adapter_tensors(config()), key: saved_matrix()}
    zoo.register(write_adapter(tmp_path / "a", items=items), name="a", base="base")
    embed, head = head_and_embedding(zoo, "base")
    new = saved_matrix().data
    expected = {(True, EMBED): (new, new), (True, HEAD): (new, new)} | {
        (False, EMBED): (new, head),
        (False, HEAD): (embed, new),
    }
    assert head_and_embedding(zoo, "a") == expected[tied, key]


def test_different_matrices_for_a_tied_base_are_refused(zoo, tmp_path, tied):
    items = {**adapter_tensors(config()), EMBED: saved_matrix("one"), HEAD: saved_matrix("two")}
    path = write_adapter(tmp_path / "a", items=items)
    if not tied:
        zoo.register(path, name="a", base="base")
        return
    with pytest.raises(UnsupportedAdapterError, match="ties"):
        zoo.register(path, name="a", base="base")


def test_saved_matrices_equal_to_the_base_cost_nothing(zoo, tmp_path):
    items = {**adapter_tensors(config()), EMBED: tensors(config())["model.embed_tokens.weight"]}
    if zoo.block(links_of(zoo, "base")[-1].base).config["tied"]:
        items[HEAD] = items[EMBED]
    zoo.register(write_adapter(tmp_path / "a", items=items), name="a", base="base")
    links, base = links_of(zoo, "a"), links_of(zoo, "base")
    assert [link.base for link in links] == [link.base for link in base]


def test_base_layer_of_an_adapted_head(zoo, tmp_path):
    values = adapter_config(target_modules=["lm_head"])
    items = {**head_adapter(), f"{PREFIX}lm_head.base_layer.weight": saved_matrix()}
    zoo.register(write_adapter(tmp_path / "a", values, items), name="a", base="base")
    assert head_and_embedding(zoo, "a")[1] == saved_matrix().data


def test_resized_vocabulary(zoo, tmp_path):
    rows = VOCAB + 3
    items = {**adapter_tensors(config()), EMBED: saved_matrix(rows=rows), HEAD: saved_matrix(rows=rows)}
    zoo.register(write_adapter(tmp_path / "a", items=items), name="a", base="base")
    chain = zoo.chain(zoo.resolve("a").chain)
    assert chain.vocab_size == rows
    for link in (chain.links[0], chain.links[-1]):
        assert zoo.block(link.base).config["vocab_size"] == rows
    assert zoo.block(chain.links[-1].base).config["tied"] is True


def test_resizing_one_matrix_only_is_refused(zoo, tmp_path):
    items = {**adapter_tensors(config()), EMBED: saved_matrix(rows=VOCAB + 3)}
    path = write_adapter(tmp_path / "a", adapter_config(modules_to_save=["embed_tokens"]), items)
    with pytest.raises(AdapterBaseMismatchError, match="rows"):
        zoo.register(path, name="a", base="base")


def test_saved_norms_become_private_layers(zoo, tmp_path):
    items = adapter_tensors(config())
    for index in range(LAYERS):
        items[f"{PREFIX}model.layers.{index}.input_layernorm.weight"] = tensor((16,), seed=index)
    values = adapter_config(modules_to_save=["input_layernorm"])
    zoo.register(write_adapter(tmp_path / "a", values, items), name="a", base="base")
    links, base = links_of(zoo, "a"), links_of(zoo, "base")
    assert [one.base == two.base for one, two in zip(links, base, strict=True)] == [True, *[False] * 3, True]
    mine, theirs = zoo.block(links[1].base), zoo.block(base[1].base)
    changed = [name for name in theirs.tensors if mine.tensors[name] != theirs.tensors[name]]
    assert changed == ["input_layernorm.weight"]
    assert mine.config == theirs.config


def test_base_is_found_by_the_name_peft_recorded(zoo, tmp_path):
    for recorded in ("base", "someone/base", "/models/base/"):
        path = write_adapter(tmp_path / "a", adapter_config(base_model_name_or_path=recorded))
        assert zoo.register(path, name="a").record.provenance["base"] == "base@1"


@pytest.mark.parametrize("recorded", [None, "meta/Llama-3", "/models/basis"])
def test_unknown_base_gets_a_hint(zoo, tmp_path, recorded):
    path = write_adapter(tmp_path / "a", adapter_config(base_model_name_or_path=recorded))
    with pytest.raises(AdapterError, match="no variant matches the base") as caught:
        zoo.register(path, name="a")
    assert "--base" in caught.value.hint
    assert "base" in caught.value.hint.split("Registered: ")[1]
    with pytest.raises(VariantNotFoundError):
        zoo.register(path, name="a", base="bas")


def test_adapters_on_adapters_are_refused(zoo, tmp_path):
    path = write_adapter(tmp_path / "a")
    zoo.register(path, name="a", base="base")
    with pytest.raises(UnsupportedAdapterError, match="adapters on adapters"):
        zoo.register(path, name="b", base="a")
    items = {EMBED: saved_matrix()}
    values = adapter_config(target_modules=[], modules_to_save=["embed_tokens"])
    zoo.register(write_adapter(tmp_path / "c", values, items), name="c", base="base")
    with pytest.raises(UnsupportedAdapterError, match="adapters on adapters"):
        zoo.register(path, name="b", base="c")


def edited(**changes):
    items = adapter_tensors(config())
    for name, item in changes.items():
        key = f"{PREFIX}model.layers.1.{name.replace('__', '.')}"
        if item is None:
            del items[key]
        else:
            items[key] = item
    return items


Q = "self_attn__q_proj__lora_"
FOREIGN = {"self_attn__query__lora_A__weight": tensor((4, 16), dtype="F32")}
DORA = {"self_attn__q_proj__lora_magnitude_vector": tensor((16,), dtype="F32")}
ROW = tensor((1, 16), dtype="F32")
TOKENS = {
    **adapter_tensors(config()),
    f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": ROW,
}
REFUSED = {
    "another width": (
        {}, adapter_tensors(config(hidden_size=32)), AdapterBaseMismatchError,
    ),
    "deeper": ({}, adapter_tensors(config(num_hidden_layers=5)), AdapterBaseMismatchError),
    "shallower": ({}, adapter_tensors(config(num_hidden_layers=2)), AdapterBaseMismatchError),
    "other kv heads": ({}, adapter_tensors(config(num_key_value_heads=4)), AdapterBaseMismatchError),
    "B missing": ({}, edited(**{f"{Q}B__weight": None}), AdapterBaseMismatchError),
    "A of three dimensions": (
        {}, edited(**{f"{Q}A__weight": tensor((4, 16, 1), dtype="F32")}), AdapterBaseMismatchError,
    ),
    "A without dimensions": (
        {}, edited(**{f"{Q}A__weight": tensor((), dtype="F32")}), AdapterBaseMismatchError,
    ),
    "unequal ranks": ({}, edited(**{f"{Q}B__weight": tensor((16, 5), dtype="F32")}), AdapterError),
    "rank of the config": ({"r": 8}, None, AdapterError),
    "not targeted": ({"target_modules": ["q_proj"]}, None, AdapterError),
    "unknown module": ({}, edited(**FOREIGN), UnknownTargetError),
    "unknown targets": ({"target_modules": ["c_attn", "c_proj"]}, None, UnknownTargetError),
    "unknown tensor": ({}, edited(surprise__weight=tensor((4,), dtype="F32")), UnknownTargetError),
    "unknown module to save": ({"modules_to_save": ["classifier"]}, None, UnknownTargetError),
    "module to save missing": ({"modules_to_save": ["lm_head"]}, None, AdapterError),
    "DoRA vector": ({}, edited(**DORA), AdapterError),
    "no DoRA vectors": ({"use_dora": True}, None, AdapterError),
    "bias": ({}, edited(self_attn__q_proj__lora_B__bias=tensor((16,), dtype="F32")), AdapterError),
    "no biases": ({"lora_bias": True}, None, AdapterError),
    "biases on embeddings": (
        {"target_modules": ["q_proj", "v_proj", "embed_tokens"], "lora_bias": True},
        None, UnsupportedAdapterError,
    ),
    "no tokens": ({"trainable_token_indices": [1]}, None, AdapterError),
    "tokens of no config": ({}, TOKENS, AdapterError),
    "tokens of another number": ({"trainable_token_indices": [1, 2]}, TOKENS, AdapterBaseMismatchError),
    "a token beyond the vocabulary": ({"trainable_token_indices": [4000]}, TOKENS, AdapterBaseMismatchError),
    "a token below the vocabulary": ({"trainable_token_indices": [-1]}, TOKENS, AdapterError),
    "a token twice": ({"trainable_token_indices": [1, 1]}, TOKENS, AdapterError),
    "tokens of a layer": ({"trainable_token_indices": {"q_proj": [1]}}, TOKENS, UnsupportedAdapterError),
    "tokens of half a name": ({"trainable_token_indices": {"tokens": [1]}}, TOKENS, UnsupportedAdapterError),
    "tokens of tied matrices that differ": (
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
        TOKENS, AdapterError,
    ),
    "tokens of a head with DoRA": (
        {"trainable_token_indices": [1], "target_modules": ["lm_head"], "use_dora": True},
        {
            f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": ROW,
            f"{PREFIX}lm_head.lora_A.weight": tensor((4, 16), dtype="F32"),
            f"{PREFIX}lm_head.lora_B.weight": tensor((40, 4), dtype="F32"),
            f"{PREFIX}lm_head.lora_magnitude_vector": tensor((40,), dtype="F32"),
        },
        UnsupportedAdapterError,
    ),
    "tokens of a matrix that is saved": (
        {"trainable_token_indices": {"lm_head": [1]}, "modules_to_save": ["lm_head"]},
        {
            **adapter_tensors(config()), f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta": ROW,
            f"{PREFIX}lm_head.token_adapter.base_layer.weight": tensor((40, 16), dtype="F32"),
        },
        UnsupportedAdapterError,
    ),
    "LoRA on embeddings": (
        {"target_modules": ["embed_tokens"]},
        {f"{PREFIX}model.embed_tokens.lora_embedding_A": tensor((4, 40), dtype="F32")},
        AdapterBaseMismatchError,
    ),
    "LoRA on embeddings by name": (
        {"target_modules": ["q_proj", "v_proj", "embed_tokens"]}, None, AdapterBaseMismatchError,
    ),
    "LoRA on a norm": (
        {"target_modules": ["q_proj", "v_proj", "input_layernorm"]}, None, UnsupportedAdapterError,
    ),
    "integers": ({}, edited(**{f"{Q}A__weight": tensor((4, 16), dtype="I64")}), AdapterError),
    "base layer that is not adapted": (
        {}, {**edited(), f"{PREFIX}lm_head.base_layer.weight": saved_matrix()}, AdapterError,
    ),
    "saved matrix of another width": ({}, {**edited(), EMBED: tensor((40, 32))}, AdapterBaseMismatchError),
    "replaced twice": (
        {"target_modules": ["lm_head"]},
        {
            **head_adapter(),
            HEAD: saved_matrix(),
            f"{PREFIX}lm_head.base_layer.weight": saved_matrix(),
        },
        AdapterError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("tied", [True], indirect=True)
@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_do_not_fit(zoo, tmp_path, name):
    changes, items, expected = REFUSED[name]
    before = sorted(info.key for info in zoo.store.storage.list(""))
    path = write_adapter(tmp_path / "a", adapter_config(**changes), items)
    with pytest.raises(expected) as caught:
        zoo.register(path, name="a", base="base")
    assert type(caught.value) is expected
    assert sorted(info.key for info in zoo.store.storage.list("")) == before


@pytest.mark.parametrize("tied", [True], indirect=True)
def test_mismatch_names_tensor_shapes_and_base(zoo, tmp_path):
    path = write_adapter(tmp_path / "a", items=adapter_tensors(config(hidden_size=32)))
    with pytest.raises(AdapterBaseMismatchError) as caught:
        zoo.register(path, name="a", base="base")
    assert caught.value.metadata == {
        "tensor": f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight",
        "found": "[4, 32]",
        "expected": "[4, 16]",
        "base": "base@1",
    }
    for part in ("q_proj.lora_A", "[4, 32]", "[4, 16]", "base@1"):
        assert part in str(caught.value)


@pytest.mark.parametrize("tied", [True], indirect=True)
def test_result_is_json(zoo, tmp_path):
    result = zoo.register(write_adapter(tmp_path / "a"), name="a", base="base")
    assert json.loads(json.dumps(result.to_json()))["provenance"]["base"] == "base@1"
