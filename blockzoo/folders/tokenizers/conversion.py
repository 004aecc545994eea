"""A tokenizer.json for folders that have a tokenizer in another form only, made by transformers.

Old checkpoints hold a SentencePiece model, or vocab.json and merges.txt. The conversion is transformers' own;
nothing in the folder is executed. The result is kept beside the folder's files and is not exported.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection
from pathlib import Path

from blockzoo.errors import InvalidConfigError, MissingPackageError
from blockzoo.extras import named_extras
from blockzoo.folders.contents import OWN_PREFIX
from blockzoo.folders.files import (
    CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    kept_files,
    parse_json_object,
    read_kept_file,
)

CONVERTED = f"{OWN_PREFIX}{TOKENIZER}"
"""The name of a converted tokenizer among a variant's files."""

VOCABULARIES = ("tokenizer.model", "vocab.json")
"""Files that hold a vocabulary in another form."""
_READ = (
    *VOCABULARIES,
    "merges.txt",
    CONFIG,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
)
_NAMES_A_FILE = re.compile(r"vocab|merges|auto_map|tokenizer_object|name_or_path|.*_files?")


def source_of(names: Collection[str]) -> str | None:
    """Return the file that a tokenizer can be made from where there is no tokenizer.json; None for none."""
    if TOKENIZER in names:
        return None
    found = [name for name in VOCABULARIES if name in names]
    return found[0] if found and (found[0] != "vocab.json" or "merges.txt" in names) else None


def convert_tokenizer(folder: Path, source: str) -> bytes:
    """Return the tokenizer.json that transformers makes of a folder's tokenizer.

    Args:
        folder: a checkpoint or adapter folder.
        source: the file that holds the vocabulary.

    Raises:
        MissingPackageError: transformers or sentencepiece is not installed.
        InvalidConfigError: transformers makes no usable tokenizer of it.
    """
    least = _num_tokens(folder / source)
    with named_extras():
        import transformers
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with tempfile.TemporaryDirectory(prefix="blockzoo-") as place:
            _copy(folder, Path(place))
            made = transformers.AutoTokenizer.from_pretrained(
                place, local_files_only=True, trust_remote_code=False
            )
        backend = made.backend_tokenizer
        size = backend.get_vocab_size()
    except Exception as error:  # the libraries behind it raise whatever they like
        why = " ".join(str(error).split())[:200]
        raise _unusable(source, why or type(error).__name__) from error
    finally:
        transformers.logging.set_verbosity(level)
    # Without a file that it looks for, transformers makes a tokenizer of almost nothing and says nothing.
    if size < least:
        raise _unusable(source, f"it has {size} tokens, the file has {least}")
    return bytes(backend.to_str(), "utf-8")


def _copy(folder: Path, place: Path) -> None:
    """Copy what the conversion may read. Some keys of tokenizer_config.json name files, anywhere."""
    for name, path in kept_files(folder).items():
        if name in _READ:
            (place / name).write_bytes(read_kept_file(path))
    config = place / TOKENIZER_CONFIG
    if config.exists():
        values = parse_json_object(TOKENIZER_CONFIG, config.read_bytes())
        harmless = {key: value for key, value in values.items() if not _NAMES_A_FILE.fullmatch(key)}
        config.write_text(json.dumps(harmless))


def converted_note(source: str) -> str:
    """What the provenance says about a tokenizer that was converted."""
    return f"{TOKENIZER} was made of {source} by transformers"


def not_converted_note(error: MissingPackageError) -> str:
    """The same where the machine cannot convert."""
    return f"its tokenizer was not converted to {TOKENIZER}: {error}"


def _num_tokens(path: Path) -> int:
    """Tokens of the vocabulary in a file."""
    if path.name == "vocab.json":
        return len(parse_json_object(path.name, path.read_bytes()))
    with named_extras():
        import sentencepiece
    try:
        return int(sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size())
    except (OSError, RuntimeError) as error:
        raise _unusable(path.name, "it is no SentencePiece model") from error


def _unusable(source: str, why: str) -> InvalidConfigError:
    return InvalidConfigError(
        f"{source} cannot be converted to {TOKENIZER}: {why}",
        hint="Load the tokenizer with transformers and save it with save_pretrained(FOLDER).",
        file=source,
    )
