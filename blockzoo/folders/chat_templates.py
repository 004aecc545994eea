"""The chat templates of a folder, found as transformers 5 finds them.

`chat_template.jinja` and the files of `additional_chat_templates` stand above `chat_template` in
tokenizer_config.json: where there is one of these files, the files alone count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from blockzoo.errors import InvalidConfigError
from blockzoo.folders.files import TEMPLATE, TOKENIZER_CONFIG, template_name

DEFAULT = "default"
"""The name of the template for conversations that ask for no other."""


def is_template_file(name: str) -> bool:
    """Tell whether a kept file holds a chat template and nothing else."""
    return name == TEMPLATE or template_name(name) is not None


def has_templates(filenames: Iterable[str], tokenizer_config: Mapping[str, object]) -> bool:
    """Tell whether a folder brings a chat template in any of its files."""
    return any(map(is_template_file, filenames)) or tokenizer_config.get("chat_template") is not None


def read_templates(
    filenames: Iterable[str], tokenizer_config: Mapping[str, object], read: Callable[[str], bytes]
) -> dict[str, str]:
    """Return the chat templates of a folder: name -> Jinja source.

    Args:
        filenames: names of the folder's kept files.
        tokenizer_config: its tokenizer_config.json, {} where it has none.
        read: gives the contents of a file.

    Raises:
        InvalidConfigError: a template is not text, or has no name.
    """
    # A file named default.jinja in the folder stands above chat_template.jinja.
    files = sorted(filter(is_template_file, filenames), key=lambda name: (name != TEMPLATE, name))
    if files:
        return {template_name(name) or DEFAULT: _decode(name, read(name)) for name in files}
    stored = tokenizer_config.get("chat_template")
    if stored is None:
        return {}
    if isinstance(stored, str):
        return {DEFAULT: stored}
    if isinstance(stored, list):
        stored = dict(map(_named, stored))
    if not isinstance(stored, dict) or not all(isinstance(source, str) for source in stored.values()):
        raise _no_template()
    return stored


def _named(entry: object) -> tuple[str, object]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise _no_template()
    return entry["name"], entry.get("template")


def _no_template() -> InvalidConfigError:
    return InvalidConfigError(
        f"{TOKENIZER_CONFIG}: chat_template is neither a template nor a list of templates with names",
        hint=f"Save the template as text in {TEMPLATE}.",
        file=TOKENIZER_CONFIG,
        field="chat_template",
    )


def _decode(name: str, data: bytes) -> str:
    try:
        return bytes(data).decode()
    except UnicodeDecodeError as error:
        raise InvalidConfigError(
            f"{name} is not UTF-8 text", hint="Save the template again as UTF-8.", file=name
        ) from error
