"""`blockzoo.folders.adapters.config` against PEFT: the same modules, ranks and scales for the same config."""

import json

import pytest

from blockzoo.errors import AdapterError, UnknownTargetError, UnsupportedAdapterError
from blockzoo.folders.adapters.config import parse_adapter_config
from support.folders import adapter_config

CASES = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "one full path": {"target_modules": ["model.layers.1.mlp.up_proj", "k_proj"]},
    "regex": {"target_modules": r".*\.(q|o)_proj"},
    "regex for some layers": {"target_modules": r"model\.layers\.[02]\.self_attn\.q_proj"},
    "regex with head": {"target_modules": r"(.*\.)?(up_proj|lm_head)"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear in capitals": {"target_modules": "All-Linear"},
    "all-linear without some": {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "exclude names": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.mlp.up_proj"]},
    "exclude regex": {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*layers\.2\..*"},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layers with pattern": {
        "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"],
    },
    "layers with one pattern": {
        "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers",
    },
    "layers with alternatives that PEFT takes apart": {
        "target_modules": ["q_proj"], "layers_to_transform": [1],
        "layers_pattern": ["model.x|layers", "layers"],
    },
    "operators of every kind": {
        "target_modules": r"(?i)MODEL\.\w{5,6}\.(?P<n>[0-1]|2)\.(?:self_attn|mlp)\.[^x-z]+?_(proj){1}\Z",
        "rank_pattern": {r"[qk]_.*|up_p(?:roj){,1}": 3}, "alpha_pattern": {r"\d\.mlp\..+": 9},
    },
    "pattern that matches nothing": {
        "target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0], "layers_pattern": "layers",
    },
    "rank pattern": {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2, "q_proj": 7}},
    "rank pattern with full path": {
        "target_modules": ["q_proj"], "rank_pattern": {"model.layers.1.self_attn.q_proj": 3},
    },
    "patterns as regex, first match counts": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.[01]\..*": 2, r"q_proj": 5},
        "alpha_pattern": {r".*\.2\..*": 3, "v_proj": 32},
    },
    "pattern must match to the end": {"target_modules": ["q_proj"], "rank_pattern": {"q_pro": 2, "proj": 3}},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "r": 6},
    "rslora with patterns": {
        "target_modules": ["q_proj", "v_proj"], "use_rslora": True,
        "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5},
    },
    "odd scale": {"target_modules": ["q_proj"], "r": 3, "lora_alpha": 7},
    "modules to save leave LoRA out": {
        "target_modules": ["q_proj", "up_proj", "lm_head"], "modules_to_save": ["mlp", "lm_head"],
    },
}  # fmt: skip


FUSED_CASES = {
    "fused": {"target_modules": ["qkv_proj", "gate_up_proj"]},
    "some parts": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]},
    "a part and a whole": {"target_modules": ["v_proj", "qkv_proj"], "rank_pattern": {"v_proj": 2}},
    "regex that a part ends": {"target_modules": r".*up_proj"},
    "rank by the end of a name": {
        "target_modules": ["qkv_proj"],
        "rank_pattern": {"v_proj": 2, ".*qkv_proj": 3},
    },
    "fused, all-linear": {"target_modules": "all-linear"},
    "saved by the end of a name": {"target_modules": ["o_proj"], "modules_to_save": ["up_proj"]},
}
"""Of a model that holds queries, keys and values in one matrix, and gate and up in one."""


def maker(architecture):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    small = getattr(transformers, f"{architecture}Config")(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=40, pad_token_id=0,
    )  # fmt: skip

    def make():
        with torch.device("meta"):
            return getattr(transformers, f"{architecture}ForCausalLM")(small)

    return make


@pytest.fixture(scope="module")
def model_class():
    return maker("Llama")


@pytest.fixture(scope="module")
def fused_class():
    return maker("Phi3")


def base_modules(model):
    """What `Outline` offers: modules that own tensors, and the linear ones."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in model.state_dict()))
    return modules, [name for name in modules if type(model.get_submodule(name)).__name__ == "Linear"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_peft_changes_the_same_modules_by_the_same_scale(name, model_class):
    assert_as_peft(CASES[name], model_class)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUSED_CASES)
def test_peft_changes_the_same_fused_modules(name, fused_class):
    assert_as_peft(FUSED_CASES[name], fused_class)


def test_parts_of_fused_modules_alone_are_nothing_to_change(fused_class):
    """PEFT says so too."""
    modules, linears = base_modules(fused_class())
    with pytest.raises(UnknownTargetError) as caught:
        parse(target_modules=["q_proj", "v_proj"]).targeted(modules, linears, "lm_head")
    assert "qkv_proj" in caught.value.hint


def assert_as_peft(case, model_class):
    import peft
    from peft.tuners.lora import LoraLayer

    options = {"r": 4, "lora_alpha": 8, **case}
    wrapped = peft.get_peft_model(model_class(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    expected = {
        path.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for path, module in wrapped.named_modules()
        if isinstance(module, LoraLayer)
    }
    config = parse_adapter_config(adapter_config(**options))
    modules, linears = base_modules(model_class())
    found = config.targeted(modules, linears, "lm_head")
    assert {module: (config.rank_of(module), config.scale_of(module)) for module in found} == expected
    assert expected


def parse(**changes):
    return parse_adapter_config(adapter_config(**changes))


UNSUPPORTED = {
    "IA3": {"peft_type": "IA3"},
    "no type": {"peft_type": None},
    "classification": {"task_type": "SEQ_CLS"},
    "bias": {"bias": "lora_only"},
    "DoRA with biases": {"use_dora": True, "lora_bias": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA with steps": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "LoftQ": {"init_lora_weights": "loftq"},
    "too many tokens": {"trainable_token_indices": [*range(20_000)]},
    "parameters": {"target_parameters": ["experts.up"]},
    "replication": {"layer_replication": [[0, 1]]},
    "aLoRA": {"alora_invocation_tokens": [5]},
    "unknown field": {"use_something_new": True},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_methods_are_refused(name):
    with pytest.raises(UnsupportedAdapterError) as caught:
        parse(**UNSUPPORTED[name])
    assert caught.value.hint


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_alone(init):
    assert parse(init_lora_weights=init).rank == 4


def test_unknown_fields_that_are_off_do_no_harm():
    assert parse(use_something_new=False, another=None, third=[], runtime_config={"x": 1}).rank == 4


IMPOSSIBLE = {
    "rank 0": {"r": 0},
    "rank missing": {"r": None},
    "rank a string": {"r": "4"},
    "rank huge": {"r": 10**9},
    "alpha missing": {"lora_alpha": None},
    "alpha true": {"lora_alpha": True},
    "alpha huge": {"lora_alpha": 1e300},
    "no targets": {"target_modules": []},
    "targets a number": {"target_modules": 5},
    "targets with a number": {"target_modules": [5]},
    "targets with an empty name": {"target_modules": [""]},
    "broken regex": {"target_modules": "(q_proj"},
    "long regex": {"target_modules": "q" * 100_000},
    "broken rank pattern": {"rank_pattern": {"[": 2}},
    "rank pattern with rank 0": {"rank_pattern": {"q_proj": 0}},
    "rank pattern a list": {"rank_pattern": [1]},
    "alpha pattern with text": {"alpha_pattern": {"q_proj": "8"}},
    "layers with text": {"layers_to_transform": ["1"]},
    "rslora with text": {"use_rslora": "yes"},
    "modules to save with a broken regex": {"modules_to_save": ["("]},
    "patterns with more text than anybody needs": {
        "rank_pattern": {"q" * 4000 + str(n): 2 for n in range(99)}
    },
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_values(name):
    with pytest.raises(AdapterError) as caught:
        parse(**IMPOSSIBLE[name])
    assert type(caught.value) is AdapterError
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["c_attn"]},
        {"target_modules": ["k_proj2", "query_key_value"]},
        {"target_modules": "transformer.*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [99]},
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
    ],
)
def test_targets_that_the_base_lacks(changes, model_class):
    modules, linears = base_modules(model_class())
    with pytest.raises(UnknownTargetError) as caught:
        parse(**changes).targeted(modules, linears, "lm_head")
    assert "q_proj" in caught.value.hint


def test_names_that_match_nothing_are_passed_over_as_peft_does(model_class):
    modules, linears = base_modules(model_class())
    config = parse(target_modules=["q_proj", "query_key_value", "0.self_attn.v_proj"])
    assert config.targeted(modules, linears, "lm_head")
    assert config.without_effect(modules) == ["query_key_value"]
    assert parse(target_modules=".*q_proj").without_effect(modules) == []


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, []),
        ({"rank_pattern": {"q_proj": 2, "v_proj": 3}}, []),
        ({"rank_pattern": {"self_attn.q_proj": 2, "q_proj": 3}}, ["rank_pattern"]),
        ({"rank_pattern": {"q_proj": 2, "self_attn.q_proj": 3}}, []),
        ({"rank_pattern": {"self_attn.q_proj": 2, "q_proj": 2}}, []),
        ({"alpha_pattern": {"self_attn.q_proj": 2, "q_proj": 3}}, ["alpha_pattern"]),
    ],
)
def test_an_order_of_patterns_that_peft_does_not_keep_is_noticed(changes, fields, tmp_path, model_class):
    peft = pytest.importorskip("peft")
    modules, linears = base_modules(model_class())
    config = parse(target_modules=["q_proj"], **changes)
    targets = config.targeted(modules, linears, "lm_head")
    assert config.order_matters(targets) == fields
    peft.LoraConfig(target_modules=["q_proj"], r=4, lora_alpha=8, **changes).save_pretrained(tmp_path)
    saved = parse_adapter_config(
        {**json.loads((tmp_path / "adapter_config.json").read_text()), "task_type": "CAUSAL_LM"}
    )
    same = all(
        (saved.rank_of(name), saved.scale_of(name)) == (config.rank_of(name), config.scale_of(name))
        for name in targets
    )
    assert same == (not fields)


def test_saved_modules_are_compared_by_their_endings():
    config = parse(modules_to_save=["norm"])
    assert config.saves("model.norm")
    assert config.saves("model.layers.0.input_layernorm")
    assert not config.saves("model.layers.0.mlp")


def test_patterns_times_modules_are_bounded():
    many = parse(target_modules=["q_proj"], rank_pattern={f"layers.{i}.q_proj": 2 for i in range(1500)})
    many.check_effort(600)
    with pytest.raises(AdapterError, match="1500 patterns for 900 modules"):
        many.check_effort(900)
    assert many.order_matters([f"layers.{i}.q_proj" for i in range(100)]) == []
