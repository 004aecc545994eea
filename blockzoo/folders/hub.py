"""Models of the Hugging Face hub in place of a folder, by huggingface_hub and its cache.

Only what a variant needs is fetched: safetensors, configs, tokenizer and templates. Without a connection the
cache answers, if it has the model.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockzoo.errors import (
    CheckpointError,
    HubModelNotFoundError,
    HubUnreachableError,
    PickleRefusedError,
    StorageError,
    StorageFullError,
)
from blockzoo.extras import named_extras
from blockzoo.folders.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, WEIGHTS, is_kept, read_json

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_OURS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""Errors of the machine that fetches, not of the connection."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class FoundFolder:
    """A folder to register, and what the provenance says about its origin.

    Attributes:
        path: the folder.
        origin: entries of the provenance; empty for a folder of this machine.
    """

    path: Path
    origin: Mapping[str, str] = field(default_factory=dict)


def find_folder(source: str | Path, revision: str | None = None) -> FoundFolder:
    """Return the folder of that path, or fetch the model of that id from the hub.

    Args:
        source: a path, or ORG/NAME where there is no such path.
        revision: branch, tag or commit at the hub; None for its main branch.

    Raises:
        HubModelNotFoundError: the hub has no such model or revision, or does not show it.
        HubUnreachableError: no connection, and the cache does not have it.
        CheckpointError: it holds no weights in safetensors format.
        MissingPackageError: huggingface_hub is not installed.
    """
    if Path(source).exists() or not is_hub_id(str(source)):
        return FoundFolder(Path(source))
    return _fetch(str(source), revision)


def is_hub_id(text: str) -> bool:
    """Tell whether a text has the form of a model's id at the hub: ORG/NAME."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def _fetch(repo: str, revision: str | None) -> FoundFolder:
    with named_extras():
        import huggingface_hub
    try:
        with _typed(repo, revision):
            siblings = huggingface_hub.HfApi().model_info(repo, revision=revision).siblings or ()
            path = _download(huggingface_hub, repo, revision, [sibling.rfilename for sibling in siblings])
    except HubUnreachableError as error:
        cached = _cached(huggingface_hub, repo, revision)
        if cached is None:
            raise error from None
        path = cached
    # The cache names the folder of a snapshot by its commit.
    return FoundFolder(path, {"source": f"https://huggingface.co/{repo}", "revision": path.name})


def _cached(hub: Any, repo: str, revision: str | None) -> Path | None:
    """The model's folder in the cache, None where it is not there."""
    try:
        return Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except (hub.errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        # Of a snapshot without the files that no variant needs, the library says that it is incomplete.
        partial = getattr(error, "snapshot_path", None)
        if partial is None:
            return None
        folder = Path(partial)
        return folder if any((folder / name).exists() for name in (WEIGHTS, INDEX, ADAPTER_WEIGHTS)) else None


def _download(hub: Any, repo: str, revision: str | None, names: list[str]) -> Path:
    """Fetch what a variant needs; whatever the cache has already is not fetched again."""
    kept = [*map(_literal, filter(is_kept, names))]
    # By the name of the revision first, which the cache notes for times without a connection.
    path = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=kept))
    weights = map(_literal, _weights(repo, path, set(names)))
    return Path(hub.snapshot_download(repo, revision=path.name, allow_patterns=[*kept, *weights]))


def _weights(repo: str, path: Path, names: set[str]) -> Iterable[str]:
    if WEIGHTS in names:
        return [WEIGHTS]
    if INDEX in names:
        weight_map = read_json(path / INDEX).get("weight_map")
        return sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if ADAPTER_CONFIG in names and ADAPTER_WEIGHTS in names:
        return [ADAPTER_WEIGHTS]
    if pickles := sorted(name for name in names if name.endswith(_PICKLES)):
        raise PickleRefusedError(
            f"{repo} has its weights as pickles ({pickles[0]}), which can run code when they are opened",
            hint="Many models have a revision with safetensors at refs/pr/N: name it with --revision.",
            file=pickles[0],
        )
    raise CheckpointError(
        f"{repo} holds no weights in safetensors format",
        hint=f"It needs {WEIGHTS}, {INDEX} or {ADAPTER_WEIGHTS}.",
    )


def _literal(name: str) -> str:
    """A pattern that matches this name only."""
    return re.sub(r"([*?\[])", r"[\1]", name)


@contextmanager
def _typed(repo: str, revision: str | None) -> Iterator[None]:
    """Errors of huggingface_hub as ours."""
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubModelNotFoundError(
            f"{repo} is gated: its owner gives access to accounts that ask for it",
            hint="Ask for access on its page, then set HF_TOKEN or run `hf auth login`.",
            model=repo,
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubModelNotFoundError(
            f"there is no folder {repo}, and the hub has no model of that id or does not show it",
            hint="Check the spelling. For a private model set HF_TOKEN or run `hf auth login`.",
            model=repo,
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubModelNotFoundError(
            f"{repo} has no revision {revision!r}",
            hint="Name a branch, a tag or a commit that its page lists.",
            model=repo,
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        raise _unreachable(repo, at, error) from error
    except OSError as error:
        if error.errno in _OURS:
            raise _cannot_keep(error) from error
        raise _unreachable(repo, at, error) from error
    except Exception as error:
        # Errors of the HTTP client, which is another one in other releases of the library.
        if type(error).__module__.startswith(("http", "requests")):
            raise _unreachable(repo, at, error) from error
        raise


def _cannot_keep(error: OSError) -> StorageError:
    kind = StorageFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
    return kind(
        f"what the hub sent cannot be kept at {error.filename or 'the cache'}: {error.strerror}",
        hint="HF_HOME names the folder of the cache.",
    )


def _unreachable(repo: str, at: str, error: Exception) -> HubUnreachableError:
    return HubUnreachableError(
        f"{repo}{at} is not in the cache of this machine, and the hub does not answer: {str(error)[:200]}",
        hint="Check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, or name a folder.",
        model=repo,
    )
