"""What the files beside tokenizer.json say about tokens, collected as transformers 5 collects it.

Pure: parsed JSON in, values out. `blockserve.router.intake.tokenizer` applies them to the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from blockzoo.errors import InvalidConfigError
from blockzoo.folders.files import TOKENIZER_CONFIG

ADDED_TOKENS = "added_tokens.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names of special tokens that every tokenizer may have."""

MAX_TOKENS = 100_000
"""Most tokens that the files may add."""

_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """One token that the tokenizer finds in text before anything else.

    Attributes:
        content: its text.
        special: left out of answers.
        lstrip, rstrip: takes the white space on its left or right along.
        single_word: found only as a whole word.
        normalized: found in normalised text; None for what goes with `special`.
        is_text: the file gives a text and no object; transformers takes the two for different tokens.
    """

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None
    is_text: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What applies on top of tokenizer.json.

    Attributes:
        added: (id by the files, token) in the order of the ids; the tokenizer decides on the ids.
        named: (role, token): bos_token and its like, and roles that only this model knows.
        extra: further special tokens.
        split_special_tokens: special tokens in text are cut up like other text.
        has_decoder: `added` is complete; else the added tokens of tokenizer.json are part of it.
    """

    added: tuple[tuple[int, AddedToken], ...] = ()
    named: tuple[tuple[str, AddedToken], ...] = ()
    extra: tuple[AddedToken, ...] = ()
    split_special_tokens: bool = False
    has_decoder: bool = False

    @property
    def variables(self) -> dict[str, str]:
        """Special tokens by role, as chat templates may name them."""
        return {role: token.content for role, token in self.named}

    def to_add(self, present: Sequence[tuple[int, AddedToken]]) -> tuple[AddedToken, ...]:
        """Return the tokens to add to a tokenizer, in order.

        Args:
            present: ids and added tokens of tokenizer.json.
        """
        decoder = dict(self.added) if self.has_decoder else dict(self.added) | dict(present)
        by_content = {token.content: token for _, token in self.added}
        if not self.has_decoder:
            by_content |= {token.content: token for _, token in present}
        named = [by_content.get(token.content, token) for _, token in self.named]
        adding = [token for _, token in sorted(decoder.items())]
        known = {token.content for _, token in present} | {token.content for token in adding}
        # Objects that differ in a flag are added one after the other, and so are a text and an object.
        further = dict.fromkeys(token for token in (*named, *self.extra) if token.content not in known)
        adding += further
        roles = {token.content for token in named}
        return tuple(replace(token, special=token.special or token.content in roles) for token in adding)


def tokenizer_facts(
    config: Mapping[str, Any], special_tokens_map: Mapping[str, Any], added_tokens: Mapping[str, Any]
) -> TokenizerFacts:
    """Collect what the files beside tokenizer.json say.

    Args:
        config: tokenizer_config.json, {} where there is none; so for the others.
        special_tokens_map: special_tokens_map.json; counts where the config has no `added_tokens_decoder`.
        added_tokens: added_tokens.json; likewise.

    Raises:
        InvalidConfigError: a value makes no sense.
    """
    decoder = config.get("added_tokens_decoder")
    values = {key: (TOKENIZER_CONFIG, value) for key, value in config.items() if key not in _LISTS}
    lists = _Lists(config)
    if decoder is None:
        # The file of earlier releases, which counts where the config does not hold the tokens.
        values |= _special_tokens(special_tokens_map)
        lists.add(special_tokens_map)
    named, extra = {**_named(values), **lists.roles()}, lists.extra()
    if decoder is None:
        added = _added_tokens(added_tokens, _said_special(values) | lists.said_special())
    else:
        added = _decoder(decoder)
    if len(added) + len(extra) > MAX_TOKENS:
        raise _invalid(TOKENIZER_CONFIG, "added_tokens_decoder", f"{len(added)} tokens")
    return TokenizerFacts(
        added=tuple(sorted(added.items())),
        named=tuple(named.items()),
        extra=tuple(extra),
        split_special_tokens=config.get("split_special_tokens") is True,
        has_decoder=decoder is not None,
    )


_EXTRA, _ADDITIONAL, _MODEL = (
    "extra_special_tokens",
    "additional_special_tokens",
    "model_specific_special_tokens",
)
_LISTS = (_EXTRA, _ADDITIONAL, _MODEL)


class _Lists:
    """Special tokens beside those of the common roles: lists of tokens, and roles of this model."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._roles: dict[str, AddedToken] = {}
        self._extra: list[AddedToken] | None = None
        self._additional: list[AddedToken] = []
        self._in_map: set[str] = set()
        extra, file = config.get(_EXTRA), TOKENIZER_CONFIG
        if config.get(_ADDITIONAL) is not None and not extra:
            self._extra = self._tokens(file, _ADDITIONAL, config[_ADDITIONAL])
        elif isinstance(extra, dict):
            self._add_roles(file, extra)
            if (additional := config.get(_ADDITIONAL)) is not None:
                self._additional = self._tokens(file, _ADDITIONAL, additional)
        elif extra is not None:
            self._extra = self._tokens(file, _EXTRA, extra)
        if isinstance(roles := config.get(_MODEL), dict):
            self._add_roles(file, roles)

    def add(self, special_tokens_map: Mapping[str, Any]) -> None:
        """Take what special_tokens_map.json has of them: its list comes behind that of the config."""
        extra, file = special_tokens_map.get(_EXTRA), SPECIAL_TOKENS_MAP
        if isinstance(extra, dict):
            self._add_roles(file, extra)
        elif extra is not None:
            known = self._extra or []
            contents = {token.content for token in known}
            more = [replace(token, special=True) for token in self._tokens(file, _EXTRA, extra)]
            self._in_map = {token.content for token in more}
            self._extra = [*known, *(token for token in more if token.content not in contents)]
        if (additional := special_tokens_map.get(_ADDITIONAL)) is not None:
            self._additional = self._tokens(file, _ADDITIONAL, additional)

    def said_special(self) -> set[str]:
        """Tokens that added_tokens.json need not call special; see `_said_special`."""
        return {token.content for token in self._extra or () if token.is_text} | self._in_map

    def extra(self) -> list[AddedToken]:
        """The further special tokens."""
        return self._additional if self._extra is None else self._extra

    def roles(self) -> dict[str, AddedToken]:
        """The roles of this model."""
        return self._roles

    def _add_roles(self, file: str, roles: Mapping[str, Any]) -> None:
        self._roles |= {role: _token(file, role, value) for role, value in roles.items()}

    @staticmethod
    def _tokens(file: str, key: str, values: Any) -> list[AddedToken]:
        if not isinstance(values, list):
            raise _invalid(file, key, values)
        return [_token(file, key, value) for value in values]


_Values = Mapping[str, tuple[str, Any]]
"""Field -> the file that it is from, and its value."""

_NOTHING = (TOKENIZER_CONFIG, None)


def _said_special(values: _Values) -> set[str]:
    """Tokens of the common roles that added_tokens.json need not call special.

    An object in tokenizer_config.json is not among them: transformers looks before it has read the objects.
    """
    found = set()
    for role in ROLES:
        file, value = values.get(role, _NOTHING)
        if isinstance(value, str):
            found.add(value)
        elif file == SPECIAL_TOKENS_MAP and isinstance(value, dict):
            found.add(str(value.get("content")))
    return found


def _special_tokens(source: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """special_tokens_map.json, whose objects are all special tokens."""
    values = {}
    for key, value in source.items():
        if key not in _LISTS:
            token = {**value, "special": True} if isinstance(value, dict) else value
            values[key] = SPECIAL_TOKENS_MAP, token
    return values


def _named(values: _Values) -> dict[str, AddedToken]:
    """Tokens by role: the common roles, then those that only this model has."""
    named = {}
    own = [key for key in values if key.endswith("_token") and key not in ROLES]
    for key in (*ROLES, *own):
        file, value = values.get(key, _NOTHING)
        if isinstance(value, (str, dict)):
            named[key] = _token(file, key, value)
    return named


def _added_tokens(source: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    added = {}
    for content, index in source.items():
        if type(index) is not int or index < 0:
            raise _invalid(ADDED_TOKENS, content, index)
        is_special = content in special
        added[index] = AddedToken(content, special=is_special, normalized=not is_special)
    return added


def _decoder(source: Any) -> dict[int, AddedToken]:
    if not isinstance(source, dict):
        raise _invalid(TOKENIZER_CONFIG, "added_tokens_decoder", source)
    added = {}
    for index, value in source.items():
        if not index.isascii() or not index.isdigit() or not isinstance(value, dict):
            raise _invalid(TOKENIZER_CONFIG, "added_tokens_decoder", {index: value})
        added[int(index)] = _token(TOKENIZER_CONFIG, f"added_tokens_decoder[{index}]", value)
    return added


def _token(file: str, key: str, value: Any) -> AddedToken:
    """A token from its text or its object; a text alone is a special token."""
    if isinstance(value, str):
        return AddedToken(value, special=True, is_text=True)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise _invalid(file, key, value)
    flags = {name: value[name] for name in _FLAGS if value.get(name) is not None}
    if not all(type(flag) is bool for flag in flags.values()):
        raise _invalid(file, key, value)
    return AddedToken(value["content"], **flags)


def _invalid(file: str, key: str, value: Any) -> InvalidConfigError:
    return InvalidConfigError(
        f"{file}: {key[:80]} is {str(value)[:80]!r}, which does not say what token is meant",
        hint="Save the tokenizer again with save_pretrained of transformers, or correct the file.",
        file=file,
        field=key[:80],
    )
