import json
import math

import pytest

from blockzoo import families
from blockzoo.canonical import canonical_json, digest_json
from blockzoo.errors import InvalidConfigError, UnsupportedArchitectureError, UnsupportedFeatureError
from blockzoo.folders.checkpoint_plan import plan_checkpoint
from blockzoo.manifest import BlockKind
from support.folders import ARCHITECTURES, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB, WIDE, config, shapes


def plan(architecture="LlamaForCausalLM", **changes):
    return families.for_architecture(architecture).plan(config(architecture, **changes))


def transformers_config(values):
    transformers = pytest.importorskip("transformers")
    options = {key: value for key, value in values.items() if key not in ("architectures", "model_type")}
    return transformers.CONFIG_MAPPING[values["model_type"]](**options)


def planned_shapes(chain):
    return {tensor.source: tensor.shape for block in chain.blocks for tensor in block.tensors.values()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_plan_names_every_tensor_with_its_shape(architecture, tied):
    chain = plan(architecture, tie_word_embeddings=tied)
    expected = shapes(config(architecture, tie_word_embeddings=False))
    assert planned_shapes(chain) == expected
    assert chain.tied is tied
    kinds = [block.kind for block in chain.blocks]
    assert kinds == [BlockKind.EMBEDDING, *[BlockKind.LAYER] * LAYERS, BlockKind.HEAD]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_plan_agrees_with_the_modules_of_transformers(architecture, changes):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    values = config(architecture, tie_word_embeddings=False, use_sliding_window=False, **changes)
    with torch.device("meta"):
        model = getattr(transformers, architecture)(transformers_config({**values, "pad_token_id": 0}))
    expected = {name: tuple(item.shape) for name, item in model.state_dict().items()}
    if architecture in ("Qwen2ForCausalLM", "MistralForCausalLM"):
        values = {key: value for key, value in values.items() if key not in ("attention_bias", "mlp_bias")}
    assert planned_shapes(families.for_architecture(architecture).plan(values)) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_is_found_again_by_its_name(architecture):
    family = families.for_architecture(architecture)
    chain = plan(architecture)
    for position, block in enumerate(chain.blocks):
        for name, tensor in block.tensors.items():
            assert family.source_name(position, LAYERS, name) == tensor.source
            assert family.locate(tensor.source, LAYERS) == (position, name)
    for foreign in (
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.01.x",
        "transformer.wte.weight",
        "lm_head",
    ):
        assert family.locate(foreign, LAYERS) is None


def test_layer_config_holds_what_the_computation_needs_and_no_index():
    layer = plan().blocks[1]
    assert layer.config == {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "norm_eps": "1e-05",
        "rope": {"type": "default", "theta": "10000.0"},
        "activation": "silu",
        "sliding_window": None,
        "qk_norm": False,
    }
    assert [dict(block.config) for block in plan().blocks[1:-1]] == [dict(layer.config)] * LAYERS
    # Context length, token ids and the like do not change what a layer computes.
    assert plan(max_position_embeddings=64, bos_token_id=9, attention_dropout=0.5).blocks[1] == layer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_configs_are_canonical_json(architecture):
    for block in plan(architecture).blocks:
        assert json.loads(canonical_json(dict(block.config))) == block.config


def test_embedding_and_head():
    chain = plan(tie_word_embeddings=False)
    assert chain.blocks[0].config == {"hidden_size": HIDDEN, "vocab_size": VOCAB}
    assert chain.blocks[-1].config == {
        "hidden_size": HIDDEN, "vocab_size": VOCAB, "norm_eps": "1e-05", "tied": False,
    }  # fmt: skip
    assert chain.blocks[0].tensors["weight"].chunk_rows == 4096
    assert chain.blocks[-1].tensors["lm_head.weight"].chunk_rows == 4096
    assert (chain.context_length, chain.vocab_size) == (128, VOCAB)


OLD_AND_NEW_ROPE = {
    "default": (
        {"rope_theta": 500000.0},
        {"rope_type": "default", "rope_theta": 500000.0},
        {"type": "default", "theta": "500000.0"},
    ),
    "integer theta": (
        {"rope_theta": 10000},
        {"rope_theta": 10000},
        {"type": "default", "theta": "10000.0"},
    ),
    "linear": (
        {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_type": "linear", "factor": 4, "rope_theta": 1e6},
        {"type": "linear", "theta": "1000000.0", "factor": "4.0"},
    ),
    "linear by 1 is no scaling": (
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_type": "linear", "factor": 1},
        {"type": "default", "theta": "10000.0"},
    ),
    "llama3": (
        {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 500000.0,
        },
        {
            "type": "llama3", "theta": "500000.0", "factor": "8.0", "low_freq_factor": "1.0",
            "high_freq_factor": "4.0", "original_context_length": 64,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD_AND_NEW_ROPE)
def test_rope_of_transformers_4_and_5(name):
    old, new, expected = OLD_AND_NEW_ROPE[name]
    assert plan(rope_parameters=None, **old).blocks[1].config["rope"] == expected
    assert plan(rope_parameters=new).blocks[1].config["rope"] == expected


def test_llama3_without_original_length_uses_the_context_length():
    values = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert plan(rope_parameters=values).blocks[1].config["rope"]["original_context_length"] == 128


@pytest.mark.parametrize("kind", ["su", "proportional", "mrope"])
def test_other_rope_types_are_refused_by_name(kind):
    with pytest.raises(UnsupportedFeatureError, match=kind) as caught:
        plan(rope_parameters={"rope_type": kind, "factor": 2.0})
    assert "default, linear, llama3" in caught.value.hint


@pytest.mark.parametrize("architecture", families.supported())
@pytest.mark.parametrize("names", [None, []])
def test_the_model_type_counts_where_no_architecture_is_named(architecture, names):
    transformers = pytest.importorskip("transformers")
    values = config(architecture)
    expected = plan_checkpoint(values)
    assert plan_checkpoint({**values, "architectures": names}) == expected
    theirs = transformers.AutoModelForCausalLM._model_mapping[
        transformers.CONFIG_MAPPING[values["model_type"]]
    ]
    assert theirs.__name__ == architecture


def test_a_model_type_of_another_family_is_refused():
    values = config("MistralForCausalLM")
    with pytest.raises(InvalidConfigError, match="model_type is 'llama'"):
        plan_checkpoint({**values, "model_type": "llama"})
    assert plan_checkpoint({**values, "model_type": "my_own"}) == plan_checkpoint(values)


def test_an_unknown_model_type_is_refused_by_name():
    with pytest.raises(UnsupportedArchitectureError, match="mamba"):
        plan_checkpoint({"model_type": "mamba"})


YARN = {
    "factor": {"factor": 4.0, "original_max_position_embeddings": 32},
    "by the ratio": {"original_max_position_embeddings": 32},
    "betas": {"factor": 4.0, "beta_fast": 20, "beta_slow": 2, "original_max_position_embeddings": 32},
    "not truncated": {"factor": 4.0, "truncate": False, "original_max_position_embeddings": 32},
    "mscale": {
        "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.3, "original_max_position_embeddings": 16,
    },
    "attention": {"factor": 4.0, "attention_factor": 1.5, "original_max_position_embeddings": 32},
    "no extension": {"factor": 1.0, "original_max_position_embeddings": 128},
}  # fmt: skip


@pytest.mark.parametrize("name", YARN)
@pytest.mark.parametrize("theta", [10000.0, 7.0])
def test_yarn_is_that_of_transformers(name, theta):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from blockkernels.rotary import inverse_frequencies
    from blockzoo.compute.parts import rope_parameters

    values = {"rope_type": "yarn", "rope_theta": theta, **YARN[name]}
    made = plan(rope_parameters=values)
    ours = rope_parameters(made.blocks[1].config)
    head_dim = made.blocks[1].config["head_dim"]
    theirs = transformers.LlamaConfig(
        hidden_size=head_dim * 2, num_attention_heads=2, head_dim=head_dim,
        max_position_embeddings=128, rope_parameters={"factor": None, **values},
    )  # fmt: skip
    freqs, scale = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    assert made.context_length == 128
    assert ours.scale == pytest.approx(scale, rel=1e-12)
    torch.testing.assert_close(inverse_frequencies(ours), freqs, rtol=1e-6, atol=0)


def test_ropes_that_change_with_the_length():
    made = plan(rope_parameters={"rope_type": "dynamic", "factor": 4.0})
    rope = {"type": "dynamic", "theta": "10000.0", "factor": "4.0", "original_context_length": 128}
    assert (made.blocks[1].config["rope"], made.context_length) == (rope, 512)
    assert "served up to 512 tokens" in made.notes[0]
    for factor in (1.0, 0.5):  # nothing is ever scaled: the layers are those of a model without
        assert plan(rope_parameters={"rope_type": "dynamic", "factor": factor}) == plan()
    assert plan(rope_parameters={"rope_type": "dynamic", "factor": 1e6}).context_length == 128 * 10**6
    with pytest.raises(InvalidConfigError, match="factor"):
        plan(rope_parameters={"rope_type": "dynamic"})
    with pytest.raises(InvalidConfigError, match="dynamic rope needs more"):
        plan(rope_parameters={"rope_type": "dynamic", "factor": 4.0}, head_dim=2)
    head_dim = made.blocks[1].config["head_dim"]
    factors = [1.0 + i for i in range(head_dim // 2)]
    values = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors[::-1]}
    grows = {**values, "original_max_position_embeddings": 32}
    made = plan(rope_parameters=grows)
    rope = made.blocks[1].config["rope"]
    short, long = [repr(factor) for factor in factors], [repr(factor) for factor in factors[::-1]]
    assert (rope["short_factors"], rope["long_factors"], rope["original_context_length"]) == (short, long, 32)
    assert "factors" not in rope  # what programs ask for that know no long sequences
    assert (made.context_length, made.notes) == (128, ())
    assert float(rope["attention_factor"]) == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32)))
    fixed = plan(rope_parameters=values)
    assert (fixed.blocks[1].config["rope"]["factors"], fixed.notes) == (short, ())
    for key in ("short_factor", "long_factor"):
        for bad in (factors[1:], [*factors[1:], 0], [*factors[1:], 1e9], "x", None):
            with pytest.raises(InvalidConfigError, match=key):
                plan(rope_parameters={**grows, key: bad})


REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
"""Keys without which no model is meant; transformers would take the sizes of some published model."""
FOR_ABSENT = {
    "hidden_size": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 8,
    "use_sliding_window": True,
    "sliding_window": 16,
    "max_window_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
}


ABSENT = [
    (architecture, key)
    for architecture in ARCHITECTURES
    for key in config(architecture, **FOR_ABSENT)
    if key not in ("architectures", "model_type")
]


@pytest.mark.parametrize(("architecture", "key"), ABSENT)
def test_an_absent_key_is_what_transformers_takes_it_for_or_is_named(architecture, key):
    pytest.importorskip("transformers")
    values = config(architecture, **FOR_ABSENT)
    del values[key]
    family = families.for_architecture(architecture)
    if key in REQUIRED:
        with pytest.raises(InvalidConfigError) as caught:
            family.plan(values)
        assert caught.value.metadata["field"] == key
        return
    assert family.plan(transformers_config(values).to_dict()) == family.plan(values)


def windows(**changes):
    return [block.config["sliding_window"] for block in plan(**changes).blocks[1:-1]]


def test_sliding_windows():
    assert windows(architecture="MistralForCausalLM", sliding_window=32) == [32] * 3
    mistral = config("MistralForCausalLM", sliding_window=None)
    assert "sliding_window" not in mistral
    assert windows(architecture="MistralForCausalLM", sliding_window=None) == [4096] * 3
    null = families.for_architecture("MistralForCausalLM").plan({**mistral, "sliding_window": None})
    assert [block.config["sliding_window"] for block in null.blocks[1:-1]] == [None] * 3
    qwen = {"architecture": "Qwen2ForCausalLM", "sliding_window": 16}
    assert windows(**qwen) == [None] * 3
    assert windows(**qwen, use_sliding_window=True, max_window_layers=1) == [None, 16, 16]
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    qwen["architecture"] = "Qwen3ForCausalLM"
    assert windows(**qwen, use_sliding_window=True, layer_types=types) == [16, None, 16]
    # Llama ignores the field, as transformers does.
    assert windows(sliding_window=16) == [None] * 3


def test_head_dim_and_defaults():
    assert plan(head_dim=6).blocks[1].config["head_dim"] == 6
    assert plan("Qwen3ForCausalLM", head_dim=None).blocks[1].config["head_dim"] == 128
    assert plan(num_key_value_heads=None).blocks[1].config["num_kv_heads"] == HEADS
    assert plan(rms_norm_eps=None).blocks[-1].config["norm_eps"] == "1e-06"
    assert plan(tie_word_embeddings=None).tied is False
    assert plan(hidden_act="gelu_pytorch_tanh").blocks[1].config["activation"] == "gelu_pytorch_tanh"
    assert plan(hidden_act="swish").blocks[1] == plan().blocks[1]


INVALID = {
    "zero heads": {"num_attention_heads": 0},
    "negative layers": {"num_hidden_layers": -1},
    "a billion layers": {"num_hidden_layers": 10**9},
    "hidden size missing": {"hidden_size": None},
    "hidden size a string": {"hidden_size": "16"},
    "hidden size a fraction": {"hidden_size": 16.5},
    "hidden size true": {"hidden_size": True},
    "hidden size not divisible": {"hidden_size": 18},
    "kv heads do not divide": {"num_key_value_heads": 3},
    "zero kv heads": {"num_key_value_heads": 0},
    "odd head": {"head_dim": 5},
    "zero vocabulary": {"vocab_size": 0},
    "vocabulary 2**40": {"vocab_size": 2**40},
    "epsilon zero": {"rms_norm_eps": 0},
    "epsilon a string": {"rms_norm_eps": "1e-5"},
    "epsilon huge": {"rms_norm_eps": 10**400},
    "context missing": {"max_position_embeddings": None},
    "tied a string": {"tie_word_embeddings": "yes"},
    "theta negative": {"rope_parameters": {"rope_theta": -1.0}},
    "rope a list": {"rope_parameters": [1]},
    "linear without factor": {"rope_parameters": {"rope_type": "linear"}},
    "llama3 without its factors": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
    "llama3 bands reversed": {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
        }
    },
    "layer types too few": {"architecture": "Qwen2ForCausalLM", "layer_types": ["full_attention"]},
    "window not in use": {
        "architecture": "Qwen2ForCausalLM", "layer_types": ["sliding_attention"] * 3, "sliding_window": 8,
    },
    "window zero": {"architecture": "MistralForCausalLM", "sliding_window": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_values_that_no_model_can_have(name):
    with pytest.raises(InvalidConfigError) as caught:
        plan(**INVALID[name])
    assert type(caught.value) is InvalidConfigError
    assert caught.value.metadata["field"]
    assert len(str(caught.value)) < 300


UNSUPPORTED = {
    "activation": {"hidden_act": "relu"},
    "partial rotary": {"partial_rotary_factor": 0.5},
    "rope per layer type": {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
    "quantised": {"quantization_config": {"quant_method": "gptq"}},
    "layer type": {"architecture": "Qwen3ForCausalLM", "layer_types": ["linear_attention"] * 3},
    "mistral with layer types": {"architecture": "MistralForCausalLM", "layer_types": ["full_attention"] * 3},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_parts_that_blocks_do_not_compute(name):
    with pytest.raises(UnsupportedFeatureError):
        plan(**UNSUPPORTED[name])


def test_registry():
    assert set(families.supported()) == set(ARCHITECTURES)
    assert [families.get(name).name for name in ("llama", "mistral", "qwen2", "qwen3")]
    for lookup in (families.get, families.for_architecture):
        with pytest.raises(UnsupportedArchitectureError) as caught:
            lookup("GPT2LMHeadModel")
        assert all(name in caught.value.hint for name in ARCHITECTURES)


def test_only_rotary_frequencies_may_be_left_over():
    family = families.get("llama")
    assert family.is_ignorable("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert family.is_ignorable("rotary_emb.inv_freq")
    assert not family.is_ignorable("model.layers.0.self_attn.q_proj.bias")


GOLDEN = {
    "LlamaForCausalLM": "fe6536b9e6d1c39b4088faa522d9020ce6757f8c8cea153908b9f905feff6f28",
    "MistralForCausalLM": "a1a29ae97f3f80b4e5cb914de23f2a8299eac65d2d1b7404de75ee0ea73f8634",
    "Qwen2ForCausalLM": "40caab60cc7a86eecce969c303061f6d00f92507433cdc37e16aeb4c47c55913",
    "Qwen3ForCausalLM": "85cd46032a3500fc1135ba01f9224aedf0422c099f76c5df0e4374e363317d43",
    "Gemma2ForCausalLM": "eb39c88a9da3c86eb23e8554f8d311d5da2b10a099b193041fda6a6ba9d0d93e",
    "Gemma3ForCausalLM": "90d748172cac3ca86ee5cfb8b1e47f925649b413a76fc26f238baaa51552976b",
    "Glm4ForCausalLM": "5096978e848352a9b679e258b070d4e159dc7184aa400eebc5ebd393404adb15",
    "GraniteForCausalLM": "78d46b5de170349a4fcb80b51337d899b67d457873b68af02c877fc22224fba2",
    "Olmo2ForCausalLM": "91cf71bf75b71bf0db7876496947da8f8a3ec501d190bb6101b40c909513f12a",
    "Phi3ForCausalLM": "13a31f5ce8ef98c45bada230951e47ffc7da6824abfe8871c692a8a64f11c63a",
    "SmolLM3ForCausalLM": "7b649b75b3270446ca018113ad9972000441025333fd7569a9b58ca167afd0c9",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_enters_the_digest_of_a_block_never_changes(architecture):
    """Another digest here means that nothing registered from now on shares with what is in zoos already."""
    chain = plan(architecture)
    content = [[block.kind.value, dict(block.config), sorted(block.tensors)] for block in chain.blocks]
    assert digest_json([chain.family, content]) == GOLDEN[architecture]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e-300},
        {"rope_type": "default", "rope_theta": 1e300},
        {"rope_type": "linear", "factor": 1e-30},
        {"rope_type": "linear", "factor": 1e30},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "attention_factor": 1e30,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1e-9, "high_freq_factor": 4.0},
    ],
)
def test_rope_numbers_that_no_answer_survives_are_refused_by_name(rope):
    with pytest.raises(InvalidConfigError, match="outside"):
        plan(rope_parameters=rope)
