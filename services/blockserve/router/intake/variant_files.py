"""What a variant's small files say about serving it.

`register` refuses files that make no sense. A zoo may hold variants of an earlier release, whose files were
not checked as closely: a file or value that makes no sense is ignored there, and logged.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blockserve.router.intake.chat import ChatTemplates
from blockzoo.errors import InvalidConfigError
from blockzoo.folders.chat_templates import read_templates
from blockzoo.folders.fields import GENERATION_FIELDS
from blockzoo.folders.files import CONFIG, TOKENIZER, TOKENIZER_CONFIG
from blockzoo.folders.generation import (
    GENERATION_CONFIG,
    GenerationDefaults,
    generation_defaults,
    generation_values,
)
from blockzoo.folders.tokenizers.conversion import CONVERTED
from blockzoo.folders.tokenizers.facts import (
    ADDED_TOKENS,
    SPECIAL_TOKENS_MAP,
    TokenizerFacts,
    tokenizer_facts,
)
from blockzoo.manifest import VariantRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """What a tokenizer is made of.

    Attributes:
        key: equal for variants that share a tokenizer.
        filename: the file that holds the vocabulary.
        facts: what the other files add to it.
    """

    key: str
    filename: str
    facts: TokenizerFacts


class VariantFiles:
    """The files of one version of a variant, each read at most once."""

    def __init__(self, record: VariantRecord, read: Callable[[str], bytes]) -> None:
        """Begin.

        Args:
            record: names the files.
            read: file name to contents; called for files of the record.
        """
        self._record = record
        self._read = read
        self._tokenizer_config = self._json_object(TOKENIZER_CONFIG)
        self._facts = self._read_facts()

    def generation_defaults(self, vocab_size: int) -> GenerationDefaults:
        """What generation_config.json asks for, and end tokens of config.json where it names none."""
        config = self._json_object(CONFIG)
        own = self._json_object(GENERATION_CONFIG) if GENERATION_CONFIG in self._record.files else None
        generation = generation_values(own, config, GENERATION_FIELDS)
        return generation_defaults(generation, config, vocab_size, self._log)

    def chat_templates(self) -> ChatTemplates:
        """The templates by name and the special tokens they may mention."""
        try:
            by_name = read_templates(self._record.files, self._tokenizer_config, self._read)
        except InvalidConfigError as error:
            self._log(error)
            by_name = {}
        return ChatTemplates(by_name, self._facts.variables)

    def tokenizer(self) -> TokenizerSource | None:
        """What the tokenizer is made of, None when there is no tokenizer.json, nor one that was made."""
        name = TOKENIZER if TOKENIZER in self._record.files else CONVERTED
        file = self._record.files.get(name)
        if file is None:
            return None
        facts = hashlib.sha256(repr(self._facts).encode()).hexdigest()
        return TokenizerSource(f"{file.blob}:{facts}", name, self._facts)

    def _read_facts(self) -> TokenizerFacts:
        try:
            return tokenizer_facts(
                self._tokenizer_config, self._json_object(SPECIAL_TOKENS_MAP), self._json_object(ADDED_TOKENS)
            )
        except InvalidConfigError as error:
            self._log(error)
            return TokenizerFacts()

    def _json_object(self, name: str) -> dict[str, Any]:
        if name not in self._record.files:
            return {}
        try:
            value = json.loads(self._read(name))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            log.warning("%s of %s is not a JSON object and is ignored", name, self._record.name)
            return {}
        return value

    def _log(self, error: InvalidConfigError) -> None:
        log.warning("variant %s@%d: ignored: %s", self._record.name, self._record.version, error)
