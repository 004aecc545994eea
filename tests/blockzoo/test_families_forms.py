"""What config.json can change about each architecture, against what transformers makes of the same file."""

import pytest

from blockzoo import families
from blockzoo.errors import InvalidConfigError, UnsupportedFeatureError
from support.folders import ARCHITECTURES, config

TYPES = ["full_attention", "sliding_attention", "full_attention"]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def plan(architecture, **changes):
    return families.for_architecture(f"{architecture}ForCausalLM").plan(
        config(f"{architecture}ForCausalLM", **changes)
    )


def layers(architecture, **changes):
    return [block.config for block in plan(architecture, **changes).blocks[1:-1]]


def assert_as_transformers_reads_it(architecture, values):
    transformers = pytest.importorskip("transformers")
    options = {key: value for key, value in values.items() if key not in ("architectures", "model_type")}
    filled = transformers.CONFIG_MAPPING[values["model_type"]](**options).to_dict()
    family = families.for_architecture(architecture)
    assert family.plan(filled) == family.plan(values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_config_with_the_sizes_alone(architecture):
    """Every other key has the value that transformers takes its absence for."""
    sizes = (
        "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "vocab_size", "max_position_embeddings",
    )  # fmt: skip
    values = config(architecture, hidden_size=256, num_attention_heads=32, num_hidden_layers=9)
    assert_as_transformers_reads_it(architecture, {key: values[key] for key in sizes})


FORMS = {
    "phi3, no window": ("Phi3", {"sliding_window": None, "rms_norm_eps": 1e-6}),
    "phi3, part in rope_parameters": (
        "Phi3",
        {"head_dim": 8, "partial_rotary_factor": None, "rope_parameters": {"partial_rotary_factor": 0.75}},
    ),
    **{
        f"phi3, {name}": (
            "Phi3",
            {
                "rope_scaling": {"type": name, "long_factor": [3.0], "short_factor": [1.5]},
                "original_max_position_embeddings": 32,
            },
        )
        for name in ("longrope", "yarn")
    },
    "smollm3, yarn": (
        "SmolLM3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
    ),
    "olmo2, yarn": (
        "Olmo2",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 500000.0, "factor": 8.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "gemma3, yarn": (
        "Gemma3",
        {
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0,
                    "original_max_position_embeddings": 64,
                }
            }
        },
    ),
    "glm4, transformers 4": (
        "Glm4", {"rope_parameters": None, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    ),
    "granite, llama3": ("Granite", {"rope_parameters": LLAMA3, "mlp_bias": True, "attention_bias": True}),
    "olmo2, transformers 4": (
        "Olmo2", {"rope_parameters": None, "rope_theta": 500000, "attention_bias": True}
    ),
    "smollm3, list": ("SmolLM3", {"no_rope_layers": [0, 1, 1, 0], "rope_parameters": LLAMA3}),
    "smollm3, window": ("SmolLM3", {"use_sliding_window": True, "sliding_window": 16}),
    "smollm3, types": (
        "SmolLM3", {"use_sliding_window": True, "sliding_window": 16, "layer_types": TYPES}
    ),
    "gemma2, types": ("Gemma2", {"layer_types": TYPES, "attn_logit_softcapping": None}),
    "gemma2, transformers 4": (
        "Gemma2", {"rope_parameters": None, "rope_theta": 20000.0, "hidden_act": "silu"}
    ),
    "gemma3, transformers 4": (
        "Gemma3",
        {
            "num_hidden_layers": 7, "layer_types": None, "rope_parameters": None, "rope_theta": 200000,
            "rope_local_base_freq": 3000, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 3,
        },
    ),
    "gemma3, one type given": ("Gemma3", {"rope_parameters": {"full_attention": LLAMA3}}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    architecture, changes = FORMS[form]
    name = f"{architecture}ForCausalLM"
    assert_as_transformers_reads_it(name, config(name, **changes))
    assert plan(architecture, **changes) != plan(architecture)


def test_which_layers_have_windows_and_positions():
    gemma2 = layers("Gemma2", num_hidden_layers=4)
    assert [layer["sliding_window"] for layer in gemma2] == [32, None, 32, None]
    gemma3 = layers("Gemma3", num_hidden_layers=7, layer_types=None)
    assert [layer["sliding_window"] for layer in gemma3] == [32] * 5 + [None, 32]
    local, whole = ({"type": "default", "theta": "700.0"},
                    {"type": "linear", "theta": "50000.0", "factor": "4.0"})  # fmt: skip
    assert [layer["rope"] for layer in gemma3] == [local] * 5 + [whole, local]
    smollm3 = layers("SmolLM3", num_hidden_layers=4, use_sliding_window=True, sliding_window=16)
    assert [layer["rope"] is None for layer in smollm3] == [False, True, False, True]
    assert [layer["sliding_window"] for layer in smollm3] == [None, 16, None, 16]


def test_what_older_programs_would_compute_wrongly_has_no_norm_eps():
    """They ask for it, and refuse a block without it as one that they cannot run."""
    for architecture in ("Gemma2", "Gemma3", "Glm4", "Granite", "Olmo2"):
        assert not any("norm_eps" in layer for layer in layers(architecture))
    assert not any(
        "norm_eps" in plan(name).blocks[-1].config for name in ("Gemma2", "Gemma3", "Granite", "Olmo2")
    )


REFUSED = {
    "phi3 has no other rope": ("Phi3", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
    "nor a dynamic one": ("Phi3", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
    "long rope by layer type": (
        "Gemma3",
        {"rope_parameters": {"full_attention": {"rope_type": "longrope", "short_factor": [1.0] * 4}}},
        "longrope",
    ),
    "dynamic rope by layer type": ("Gemma3", {"rope_scaling": {"rope_type": "dynamic"}}, "dynamic"),
    "a part of a head": ("Granite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "both directions": ("Gemma2", {"use_bidirectional_attention": True}, "bidirectional"),
    "both directions, gemma3": ("Gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
    "a cap that transformers passes over": ("Gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit"),
    "rope for all types at once": ("Gemma3", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters"),
    "a layer type": ("Gemma3", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    "activation": ("Gemma2", {"hidden_activation": "relu"}, "relu"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    architecture, changes, word = REFUSED[name]
    with pytest.raises(UnsupportedFeatureError, match=word):
        plan(architecture, **changes)


INVALID = {
    "odd part of a head": ("Glm4", {"head_dim": 10, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "more than a head": ("Phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    "positions of too few layers": ("SmolLM3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    "positions that are no numbers": ("SmolLM3", {"no_rope_layers": ["1", "0", "1"]}, "no_rope_layers"),
    "interval zero": ("SmolLM3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    "no window to slide": ("SmolLM3", {"layer_types": TYPES}, "layer_types"),
    "multiplier zero": ("Granite", {"residual_multiplier": 0}, "residual_multiplier"),
    "multiplier a string": ("Granite", {"logits_scaling": "8"}, "logits_scaling"),
    "cap zero": ("Gemma2", {"final_logit_softcapping": 0.0}, "final_logit_softcapping"),
    "scalar negative": ("Gemma2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar"),
    "pattern zero": ("Gemma3", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern"),
    "rope of a type a list": ("Gemma3", {"rope_parameters": {"full_attention": [1]}}, "rope_parameters"),
}


@pytest.mark.parametrize("name", INVALID)
def test_values_that_no_model_can_have(name):
    architecture, changes, field = INVALID[name]
    with pytest.raises(InvalidConfigError) as caught:
        plan(architecture, **changes)
    assert type(caught.value) is InvalidConfigError
    assert caught.value.metadata["field"] == field


def test_long_rope_of_phi_is_computed_again_where_it_changes():
    changes = {"rope_scaling": {"type": "su", "long_factor": [3.0], "short_factor": [1.5]}}
    cut = plan("Phi3", **changes, original_max_position_embeddings=32)
    assert (cut.context_length, cut.notes) == (128, ())
    assert cut.blocks[1].config["rope"]["growth"] == "recompute"
    changes["rope_scaling"]["type"] = "longrope"
    assert plan("Phi3", **changes, original_max_position_embeddings=32) == cut
    assert (plan("Phi3").context_length, plan("Phi3").notes) == (128, ())


def test_a_window_that_is_null_has_no_layers_to_slide_on():
    family, values = families.for_architecture("Gemma2ForCausalLM"), config("Gemma2ForCausalLM")
    with pytest.raises(InvalidConfigError, match="sliding_window"):
        family.plan({**values, "sliding_window": None})
    whole = family.plan({**values, "sliding_window": None, "layer_types": ["full_attention"] * 3})
    assert [block.config["sliding_window"] for block in whole.blocks[1:-1]] == [None] * 3
