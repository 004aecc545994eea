"""The small files next to the weights, checked before anything is written.

The router applies them when the variant is served. Here a file is refused if it makes no sense or asks for
something that blocks do not compute; fields without effect are collected, so that they can be named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from blockzoo.errors import InvalidConfigError, UnsupportedFeatureError
from blockzoo.folders.chat_templates import read_templates
from blockzoo.folders.fields import FIELDS, GENERATION_FIELDS, Treatment, check_fields, config_field
from blockzoo.folders.files import CONFIG, TOKENIZER, TOKENIZER_CONFIG, parse_json_object
from blockzoo.folders.generation import GENERATION_CONFIG, generation_defaults, generation_values
from blockzoo.folders.tokenizers.conversion import CONVERTED
from blockzoo.folders.tokenizers.facts import ADDED_TOKENS, SPECIAL_TOKENS_MAP, tokenizer_facts


def check_files_beside(
    names: Collection[str], read: Callable[[str], bytes], vocab_size: int, unread: Collection[str] = ()
) -> dict[str, str]:
    """Refuse files that make no sense or cannot be followed.

    Args:
        names: of the files that the folder brings.
        read: gives the contents of one of them.
        vocab_size: of the variant.
        unread: fields of config.json that the family did not ask for.

    Returns:
        What its provenance says about them: `set_aside` names the fields that are ignored.

    Raises:
        InvalidConfigError: a value makes no sense.
        UnsupportedFeatureError: a field asks for what blocks do not compute.
    """
    config = [name for name in unread if config_field(name).treatment is Treatment.SET_ASIDE]
    aside = [f"{CONFIG}: {', '.join(config)}"] if config else []
    aside += _FilesBeside(names, read).check(vocab_size)
    return {"set_aside": "; ".join(aside)} if aside else {}


class _FilesBeside:
    """The small files of a folder."""

    def __init__(self, names: Collection[str], read: Callable[[str], bytes]) -> None:
        self._names = names
        self._read = read

    def check(self, vocab_size: int) -> list[str]:
        parsed = {name: self._object(name) for name in FIELDS}
        asides = {name: check_fields(name, values) for name, values in parsed.items()}
        if GENERATION_CONFIG not in self._names:
            config = self._object(CONFIG)
            parsed[GENERATION_CONFIG] = generation_values(None, config, GENERATION_FIELDS)
            check_fields(GENERATION_CONFIG, parsed[GENERATION_CONFIG], shown_as=CONFIG)
        generation_defaults(parsed[GENERATION_CONFIG], self._object(CONFIG), vocab_size, _refuse)
        config = parsed[TOKENIZER_CONFIG]
        tokenizer_facts(config, parsed[SPECIAL_TOKENS_MAP], self._object(ADDED_TOKENS))
        read_templates(self._names, config, self._read)
        if config.get("clean_up_tokenization_spaces") is True:
            self._check_cleaning()
        return [f"{name}: {', '.join(fields)}" for name, fields in asides.items() if fields]

    def _object(self, name: str) -> Mapping[str, Any]:
        return parse_json_object(name, bytes(self._read(name))) if name in self._names else {}

    def _check_cleaning(self) -> None:
        """Refuse the cleaning of spaces where transformers would do it, which is everywhere but for BPE."""
        model = (self._object(TOKENIZER) or self._object(CONVERTED)).get("model")
        # Files of the first versions do not name the kind; a BPE model is the one with merges.
        if isinstance(model, dict) and model.get("type", "BPE" if "merges" in model else "") != "BPE":
            raise UnsupportedFeatureError(
                f"{TOKENIZER_CONFIG}: clean_up_tokenization_spaces removes spaces from answers of tokenizers "
                f"that are not BPE, which blockzoo does not",
                hint=f"Set it to false in {TOKENIZER_CONFIG} to register the model without it.",
                file=TOKENIZER_CONFIG,
                field="clean_up_tokenization_spaces",
            )


def _refuse(error: InvalidConfigError) -> None:
    raise error
