"""Every field of the small files of a checkpoint, and what blockzoo does with it.

A field that changes answers is applied, or the folder is refused where it is set to anything but a value
without effect; a field that changes no answer is set aside and named. `docs/compatibility.md` shows these
tables; tests hold them against the fields that the installed transformers reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from blockzoo.errors import UnsupportedFeatureError
from blockzoo.folders.files import CONFIG, TOKENIZER_CONFIG
from blockzoo.folders.generation import GENERATION_CONFIG
from blockzoo.folders.tokenizers.facts import ROLES, SPECIAL_TOKENS_MAP


class Treatment(StrEnum):
    """What is done with a field."""

    APPLIED = "applied"
    REFUSED = "refused"
    SET_ASIDE = "set aside"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a file.

    Attributes:
        treatment: what is done with it; a note says something about the file and is not even named.
        without_effect: for refused fields: the values with which it changes nothing, beside null.
        meaning: what it is, in a few words.
        sampled: for refused fields: it counts only where the file asks for sampling.
    """

    treatment: Treatment
    meaning: str
    without_effect: tuple[Any, ...] = ()
    sampled: bool = False


def _fields(treatment: Treatment, names: str, meaning: str) -> dict[str, Field]:
    return {name: Field(treatment, meaning) for name in names.split()}


def _applied(names: str, meaning: str) -> dict[str, Field]:
    return _fields(Treatment.APPLIED, names, meaning)


def _refused(name: str, meaning: str, *without_effect: Any, sampled: bool = False) -> dict[str, Field]:
    return {name: Field(Treatment.REFUSED, meaning, without_effect, sampled)}


def _set_aside(names: str, meaning: str) -> dict[str, Field]:
    return _fields(Treatment.SET_ASIDE, names, meaning)


def _notes(names: str) -> dict[str, Field]:
    return _fields(Treatment.NOTE, names, "about the file itself")


GENERATION_FIELDS: Mapping[str, Field] = {
    **_applied("do_sample temperature top_k top_p min_p", "sampling, where the caller says nothing"),
    **_applied("repetition_penalty", "penalty on tokens of prompt and output, where the caller says nothing"),
    **_applied("max_new_tokens max_length", "most tokens, where the caller says nothing"),
    **_applied("min_new_tokens min_length", "least tokens, where the caller says nothing"),
    **_applied("stop_strings", "end the answer, where the caller says nothing"),
    **_applied("eos_token_id", "end tokens"),
    **_applied("suppress_tokens bad_words_ids", "tokens that are never drawn"),
    **_applied("begin_suppress_tokens", "tokens that do not begin the answer"),
    **_applied("sequence_bias", "added to logits"),
    **_refused("top_h", "sampling by bounded entropy", sampled=True),
    **_refused("typical_p", "locally typical sampling", 1, sampled=True),
    **_refused("epsilon_cutoff", "sampling without unlikely tokens", 0, sampled=True),
    **_refused("eta_cutoff", "sampling without unlikely tokens", 0, sampled=True),
    **_refused("no_repeat_ngram_size", "n-grams appear once", 0),
    **_refused("encoder_no_repeat_ngram_size", "n-grams of the prompt do not appear", 0),
    **_refused("encoder_repetition_penalty", "favours tokens of the prompt", 1),
    **_refused("exponential_decay_length_penalty", "favours the end as the answer grows"),
    **_refused("forced_bos_token_id", "the first token"),
    **_refused("forced_eos_token_id", "the last token"),
    **_refused("num_beams", "beam search", 1),
    **_refused("num_beam_groups", "diverse beam search", 1),
    **_refused("diversity_penalty", "diverse beam search", 0),
    **_refused("constraints", "constrained beam search"),
    **_refused("force_words_ids", "constrained beam search"),
    **_refused("penalty_alpha", "contrastive search", 0),
    **_refused("dola_layers", "DoLa decoding"),
    **_refused("guidance_scale", "classifier-free guidance", 1),
    **_refused("watermarking_config", "watermarks"),
    **_refused("token_healing", "the last token of the prompt is drawn again", False),
    **_refused("max_time", "ends answers by the clock"),
    **_set_aside("num_return_sequences", "callers ask for several answers with `n`"),
    **_set_aside("early_stopping length_penalty", "beam search only"),
    **_set_aside("renormalize_logits remove_invalid_values", "change no choice"),
    **_set_aside(
        "use_cache cache_implementation cache_config max_cache_len prefill_chunk_size low_memory "
        "compile_config disable_compile continuous_batching_config",
        "how transformers computes",
    ),
    **_set_aside(
        "use_mtp is_assistant num_assistant_tokens num_assistant_tokens_schedule "
        "assistant_confidence_threshold assistant_early_exit assistant_lookbehind target_lookbehind "
        "assistant_ensemble_weight prompt_lookup_num_tokens max_matching_ngram_size speculation_type",
        "speculative decoding of transformers, which keeps the distribution of answers",
    ),
    **_set_aside(
        "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate",
        "what generate returns",
    ),
    **_set_aside("pad_token_id bos_token_id decoder_start_token_id", "batches and empty prompts"),
    **_notes("_from_model_config transformers_version _commit_hash"),
}
"""Of generation_config.json."""

TOKENIZER_FIELDS: Mapping[str, Field] = {
    **_applied(" ".join(ROLES), "special tokens, also in chat templates"),
    **_applied(
        "added_tokens_decoder additional_special_tokens extra_special_tokens model_specific_special_tokens",
        "tokens found before anything else",
    ),
    **_applied("split_special_tokens", "special tokens in text are cut up like other text"),
    **_applied("chat_template", "unless template files lie beside it"),
    **_refused(
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", "removes spaces", False
    ),
    **_refused("fix_mistral_regex", "another pre-tokeniser than that of tokenizer.json", False),
    **_refused("fast_tokenizer_files", "another file than tokenizer.json", [], ["tokenizer.json"]),
    **_set_aside(
        "clean_up_tokenization_spaces",
        "removes spaces before punctuation: not for BPE, and refused where it is true for another model",
    ),
    **_set_aside("tokenizer_class auto_map backend", "tokenizer.json says how text is cut"),
    **_set_aside(
        "add_bos_token add_eos_token", "the post-processor of tokenizer.json counts, as in transformers"
    ),
    **_set_aside(
        "add_prefix_space legacy do_lower_case errors sp_model_kwargs spaces_between_special_tokens "
        "use_default_system_prompt unk_id vocab merges vocab_file merges_file",
        "of classes that build a tokenizer without tokenizer.json",
    ),
    **_set_aside(
        "model_max_length max_len max_length stride truncation_side truncation_strategy tokenizer_truncation",
        "prompts are never cut off",
    ),
    **_set_aside(
        "padding_side pad_token_type_id pad_to_multiple_of tokenizer_padding model_input_names",
        "batches of transformers",
    ),
    **_set_aside("chat_control_tokens response_template response_schema", "how transformers reads chats"),
    **_notes(
        "name_or_path processor_class verbose init_inputs files_loaded is_local local_files_only "
        "special_tokens_map_file tokenizer_file tokenizer_object gguf_file post_processor "
        "trust_remote_code transformers_version _commit_hash"
    ),
}
"""Of tokenizer_config.json. Any further `..._token` is a role of its own and is applied."""

SPECIAL_TOKENS_FIELDS: Mapping[str, Field] = {
    **_applied(" ".join(ROLES), "where tokenizer_config.json has no added_tokens_decoder"),
    **_applied(
        "additional_special_tokens extra_special_tokens",
        "where tokenizer_config.json has no added_tokens_decoder",
    ),
}
"""Of special_tokens_map.json; further `..._token` as in tokenizer_config.json."""

CONFIG_FIELDS: Mapping[str, Field] = {
    **_applied("architectures model_type", "say which family reads the rest"),
    **_applied("eos_token_id", "end tokens, where generation_config.json names none"),
    **_set_aside(
        "attention_dropout hidden_dropout embd_pdrop resid_pdrop initializer_range pretraining_tp",
        "training only",
    ),
    **_set_aside("bos_token_id pad_token_id", "batches and empty prompts"),
    **_set_aside(
        "sliding_window original_max_position_embeddings no_rope_layer_interval _sliding_window_pattern",
        "where another field turns it off or stands above it",
    ),
    **_set_aside("use_cache output_attentions output_hidden_states return_dict", "how transformers computes"),
    **_set_aside("fusion_config distributed_config gradient_checkpointing", "how transformers computes"),
    **_set_aside(
        "num_mtp_layers mtp_layer_types mtp_mlp_layer_types mtp_per_layer_config mtp_hidden_states_first "
        "chain_hidden_post_norm",
        "layers that predict several tokens, for drafts",
    ),
    **_refused("is_causal", "attention to later tokens", True),
    **_refused("per_layer_config", "layers that differ in what other fields say", {}),
    **_refused("attention_chunk_size", "attention within chunks"),
    **_refused("kv_sharing_modes", "layers that use the keys and values of others"),
    **_refused("transformers_weights", "weights in a file of another name"),
    **_notes(
        "_name_or_path transformers_version dtype torch_dtype id2label label2id problem_type auto_map "
        "chunk_size_feed_forward is_encoder_decoder"
    ),
}
"""Of config.json, beside what the families read."""

ADAPTER_FIELDS: Mapping[str, Field] = {
    **_refused("peft_type", "the method", "LORA"),
    **_refused("task_type", "what the adapter is for", "CAUSAL_LM"),
    **_applied("r lora_alpha use_rslora rank_pattern alpha_pattern", "rank and scale"),
    **_applied("target_modules exclude_modules layers_to_transform layers_pattern", "which modules"),
    **_applied("modules_to_save", "modules that are stored whole"),
    **_applied("trainable_token_indices", "new rows of embed_tokens and lm_head"),
    **_applied("use_dora", "DoRA"),
    **_applied("lora_bias", "biases of the adapter"),
    **_applied("ensure_weight_tying", "adapters on tied matrices are tied too"),
    **_applied("base_model_name_or_path", "the base, where `--base` names none"),
    **_applied("revision", "the base's commit: register compares it with that of the base in the zoo"),
    **_refused("bias", "biases of the base are trained", "none"),
    **_refused(
        "init_lora_weights",
        "PiSSA, OLoRA and others that change the base's weights",
        True,
        False,
        "gaussian",
        "eva",
        "orthogonal",
    ),
    **_refused("fan_in_fan_out", "transposed weights", False),
    **_refused("layer_replication", "layer replication", []),
    **_refused("target_parameters", "LoRA on bare parameters", []),
    **_refused("use_qalora", "QALoRA", False),
    **_refused("alora_invocation_tokens", "activated LoRA (aLoRA)", []),
    **_refused("use_bdlora", "BD-LoRA", False),
    **_refused("arrow_config", "Arrow routing", {}),
    **_refused("kasa_config", "KaSA", {}),
    **_refused("velora_config", "VeLoRA", {}),
    **_refused("monteclora_config", "MonteCLoRA", {}),
    **_notes("auto_mapping peft_version inference_mode runtime_config"),
    **_fields(
        Treatment.NOTE,
        "lora_dropout loftq_config eva_config corda_config lora_ga_config megatron_config megatron_core "
        "qalora_group_size",
        "of training",
    ),
}
"""Of adapter_config.json. `adapters.config` applies them, and refuses fields that are not here."""

FIELDS: Mapping[str, Mapping[str, Field]] = {
    GENERATION_CONFIG: GENERATION_FIELDS,
    TOKENIZER_CONFIG: TOKENIZER_FIELDS,
    SPECIAL_TOKENS_MAP: SPECIAL_TOKENS_FIELDS,
}
"""By file name; files that lie beside weights of any kind. `blockzoo.families` reads config.json."""


def config_field(name: str) -> Field:
    """Return what is done with a field of config.json that the family does not read."""
    return CONFIG_FIELDS.get(name, UNKNOWN)


def check_config(values: Mapping[str, Any], unread: Iterable[str]) -> None:
    """Check what config.json asks for beside what the family reads.

    Args:
        values: its contents.
        unread: the fields that the family does not read.

    Raises:
        UnsupportedFeatureError: a field asks for what blocks do not compute.
    """
    for name in unread:
        _check_field(CONFIG, name, values.get(name), config_field(name))


UNKNOWN = Field(Treatment.SET_ASIDE, "transformers does not read it")


def check_fields(file: str, values: Mapping[str, Any], *, shown_as: str = "") -> list[str]:
    """Check one small file against its table.

    Args:
        file: a key of `FIELDS`.
        values: its contents.
        shown_as: the file that holds the fields, where that is another one.

    Returns:
        The fields that are set aside, in the file's order.

    Raises:
        UnsupportedFeatureError: a field asks for what blocks do not compute.
    """
    aside = []
    samples = values.get("do_sample") is True
    for name, value in values.items():
        field = field_of(file, name, value)
        if field.treatment is Treatment.SET_ASIDE:
            aside.append(name)
        if field.sampled and not samples and not is_without_effect(field, value):
            aside.append(name)
            continue
        _check_field(shown_as or file, name, value, field)
    return aside


def _check_field(file: str, name: str, value: Any, field: Field) -> None:
    if field.treatment is not Treatment.REFUSED or is_without_effect(field, value):
        return
    raise UnsupportedFeatureError(
        f"{file}: {name} is {str(value)[:80]!r} ({field.meaning}), which blocks do not compute",
        hint=f"Remove {name} from {file} to register the model without it.",
        file=file,
        field=name,
    )


def field_of(file: str, name: str, value: Any = None) -> Field:
    """Return what is done with a field of a file."""
    if file != GENERATION_CONFIG and name.endswith("_token") and isinstance(value, (str, dict)):
        return Field(Treatment.APPLIED, "a special token that only this model has")
    return FIELDS[file].get(name, UNKNOWN)


def is_without_effect(field: Field, value: Any) -> bool:
    """Whether a refused field changes nothing with this value."""
    return value is None or any(
        value == item and isinstance(value, bool) == isinstance(item, bool) for item in field.without_effect
    )
