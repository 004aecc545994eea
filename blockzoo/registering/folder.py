"""Registering a folder: check everything, store what is missing, commit one ref.

Nothing is written before the whole folder, weights included, has been found good.
A process that dies at any point leaves blobs that gc collects, and the variant as
it was.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from blockzoo.folders.checkpoint import FolderKind, open_folder
from blockzoo.folders.hub import find_folder
from blockzoo.names import check_name, check_unreserved
from blockzoo.progress import NoProgress, Progress
from blockzoo.registering.adapter import register_adapter
from blockzoo.registering.checkpoint import register_checkpoint
from blockzoo.registering.job import RegisterJob, RegisterResult
from blockzoo.registering.remarks import doubt_about_base, remarks_on
from blockzoo.store.writing import WritableZoo

__all__ = ["RegisterResult", "register_folder"]


def register_folder(
    store: WritableZoo,
    source: str | Path,
    *,
    name: str,
    base: str | None = None,
    revision: str | None = None,
    on_demand: bool = False,
    progress: Progress | None = None,
) -> RegisterResult:
    """Register a checkpoint or adapter folder as the next version of a variant.

    Args:
        store: the zoo, at hand or behind a server.
        source: the folder, whose files tell which kind it is; or ORG/NAME of a model of the Hugging Face hub
            where there is no such folder.
        name: variant name.
        base: variant that an adapter belongs to, or that a checkpoint was tuned from.
        revision: of a model of the hub; its commit becomes part of the provenance.
        on_demand: a server registers it for a request, under a reserved name.
        progress: told what is being done.

    Raises:
        InvalidNameError, CheckpointError, AdapterError: the input is refused; nothing was written.
        HubModelNotFoundError, HubUnreachableError: the model cannot be fetched.
        VariantNotFoundError: there is no variant `base`.
        StorageError, ConflictError: nothing was registered; what was stored goes with the next gc.
    """
    (check_name if on_demand else check_unreserved)(name)
    store.check_writable()
    found = find_folder(source, revision)
    with open_folder(found.path) as folder:
        job = RegisterJob(store, folder, name, progress or NoProgress(), found.origin)
        is_adapter = folder.kind is FolderKind.ADAPTER
        result = register_adapter(job, base) if is_adapter else register_checkpoint(job, base)
        return replace(
            result,
            remarks=remarks_on(folder, result.record, base_named=base is not None),
            base_doubt=doubt_about_base(store, folder, result.record),
        )
