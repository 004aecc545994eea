"""Adapter folders that PEFT itself saved: the zoo's chain holds the weights that PEFT computes with."""

import numpy as np
import pytest

from blockzoo.zoo import Zoo

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from peft.tuners.lora import LoraLayer  # noqa: E402 - after the checks above

pytestmark = pytest.mark.filterwarnings("ignore")

CASES = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {r"layers\.1\..*": 5}, "use_rslora": True,
    },
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "both saved, tied": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    },
    "head adapted, embedding saved": {
        "target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"],
    },
    "norms saved": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "a whole module saved": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]},
}  # fmt: skip


def base_model(tied, vocab=48):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=vocab, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def train(model):
    """Move every trainable weight as an optimiser would, without the optimiser."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def effective_weights(wrapped):
    """Checkpoint name -> what PEFT multiplies with, base and adapter together."""
    # Not `merge_and_unload`: it would merge an adapted head into the embedding of a tied model.
    weights = {}
    for path, module in wrapped.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            delta = module.get_delta_weight("default")
            weights[f"{path}.weight"] = (module.get_base_layer().weight + delta).detach().numpy()
    for path, parameter in wrapped.get_base_model().named_parameters(remove_duplicate=False):
        name = path.replace("modules_to_save.default.", "")
        if "lora_" not in name and "original_module." not in name:
            weights.setdefault(name.replace("base_layer.", ""), parameter.detach().numpy())
    return weights


def zoo_weights(zoo, ref):
    """The same from the zoo's blocks, adapters merged."""
    from blockzoo import families

    def array(item):
        data = b"".join(zoo.read_tensor(item))
        return np.frombuffer(data, np.float32).reshape(item.shape)

    chain = zoo.chain(zoo.resolve(ref).chain)
    family, layers = families.get(chain.family), len(chain.links) - 2
    weights = {}
    for position, link in enumerate(chain.links):
        tensors = {name: array(item).copy() for name, item in zoo.block(link.base).tensors.items()}
        for applied in link.applied:
            block = zoo.block(applied)
            for module, values in block.config["modules"].items():
                a, b = (array(block.tensors[f"{module}.lora_{side}"]) for side in "AB")
                tensors[f"{module}.weight"] += np.float32(float(values["scale"])) * (b @ a)
        weights |= {family.source_name(position, layers, name): item for name, item in tensors.items()}
    return weights


def registered(tmp_path, base, adapter):
    base.save_pretrained(tmp_path / "base")
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(tmp_path / "base", name="base")
    zoo.register(adapter, name="a", base="base")
    return zoo


def check(zoo, wrapped):
    mine, theirs = zoo_weights(zoo, "a"), effective_weights(wrapped)
    assert set(mine) == set(theirs)
    for name, weight in theirs.items():
        np.testing.assert_allclose(mine[name], weight, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", CASES)
def test_effective_weights(tmp_path, name, tied):
    options = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, **CASES[name]}
    wrapped = peft.get_peft_model(base_model(tied), peft.LoraConfig(**options))
    train(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    zoo = registered(tmp_path, base_model(tied), tmp_path / "adapter")
    check(zoo, peft.PeftModel.from_pretrained(base_model(tied), tmp_path / "adapter"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_resized_vocabulary(tmp_path, tied):
    """PEFT asks its user to resize the base before loading; the zoo takes the rows from the adapter."""
    model = base_model(tied)
    model.resize_token_embeddings(53, mean_resizing=False)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    )
    train(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    zoo = registered(tmp_path, base_model(tied), tmp_path / "adapter")
    check(zoo, wrapped)
    assert zoo.chain(zoo.resolve("a").chain).vocab_size == 53


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_the_default_folder_for_added_tokens(tmp_path, tied, saved):
    """PEFT writes a resized module in modules_to_save three times, and reads it once."""
    base_model(tied).save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(53, mean_resizing=False)
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=saved)
    wrapped = peft.get_peft_model(model, options)
    train(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    zoo = registered(tmp_path, base_model(tied), tmp_path / "adapter")
    again = base_model(tied)
    again.resize_token_embeddings(53, mean_resizing=False)
    check(zoo, peft.PeftModel.from_pretrained(again, tmp_path / "adapter"))
    out = zoo.export("a", tmp_path / "out").path
    for file in (tmp_path / "adapter").glob("adapter_*"):
        assert (out / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_was_converted_to_plain_lora_is_taken(tmp_path, init):
    options = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
    wrapped = peft.get_peft_model(base_model(False), peft.LoraConfig(**options, init_lora_weights=init))
    # PEFT's recipe: what training began with, to be subtracted when the result is saved.
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = init
    train(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=tmp_path / "start")
    zoo = registered(tmp_path, base_model(False), tmp_path / "adapter")
    check(zoo, peft.PeftModel.from_pretrained(base_model(False), tmp_path / "adapter"))


RENAMINGS = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "of-a-state-dict": lambda name: name.replace(".weight", ".mine.weight"),
    "distributed": lambda name: f"module.{name}",
    "sharded": lambda name: name.replace("layers.0", "layers.0._fsdp_wrapped_module"),
}


@pytest.mark.parametrize("name", RENAMINGS)
def test_marks_of_wrappers_are_read_past(tmp_path, name):
    from safetensors.torch import load_file, save_file

    wrapped = peft.get_peft_model(
        base_model(False), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "gone"])
    )
    train(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({RENAMINGS[name](key): value for key, value in load_file(path).items()}, path)
    zoo = registered(tmp_path, base_model(False), tmp_path / "adapter")
    check(zoo, wrapped)
    notes = zoo.resolve("a").provenance["notes"]
    assert "were read without" in notes
    assert "target_modules names gone" in notes
    out = zoo.export("a", tmp_path / "out").path
    assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("options", [
    {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"k_proj": [1]}},
])  # fmt: skip
def test_what_blocks_cannot_compute_is_refused(tmp_path, options):
    from blockzoo.errors import UnsupportedAdapterError

    wrapped = peft.get_peft_model(base_model(False), peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedAdapterError):
        registered(tmp_path, base_model(False), tmp_path / "adapter")
