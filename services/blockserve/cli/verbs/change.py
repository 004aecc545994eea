"""Verbs that change what is registered: register, export, rm, rollback."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockserve.cli.options.place import Place, at_a_place
from blockserve.cli.options.questions import confirm
from blockserve.cli.options.shared import (
    JsonOption,
    NameArgument,
    RefArgument,
    YesOption,
)
from blockserve.cli.verbs.bulk import register_all
from blockserve.cli.views.progress import progress
from blockserve.cli.views.reports import (
    HISTORY,
    dependence,
    note_doubt,
    print_exported,
    print_registered,
    print_removed,
    print_rolled_back,
)
from blockserve.cli.views.tables import print_json

if TYPE_CHECKING:
    from blockserve.client.zoo import RemoteZoo
    from blockzoo.registering.folder import RegisterResult
    from blockzoo.zoo import Zoo

RevisionOption = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="REVISION",
        help="Branch, tag or commit of a model of the hub; by default main.",
    ),
]

ForceBaseOption = Annotated[
    bool, typer.Option("--force-base", help="Do not warn if the adapter says that it is of another base.")
]


@at_a_place
def register(
    folder: Annotated[
        str | None,
        typer.Argument(
            metavar="FOLDER",
            help="A Hugging Face checkpoint or a PEFT LoRA adapter; or ORG/NAME of a model of the hub.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", "-n", metavar="NAME", help="Name of the variant.")
    ] = None,
    every: Annotated[
        Path | None,
        typer.Option(
            "--all",
            metavar="FOLDER|LIST.yaml",
            help="Register every subfolder under its own name, or what a list names: entries with folder, "
            "name, and maybe base and revision.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="VARIANT",
            help="The variant that an adapter belongs to, or that a checkpoint was tuned from. Changed "
            "tensors of a checkpoint are then stored as lossless differences when that is smaller.",
        ),
    ] = None,
    revision: RevisionOption = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            metavar="N",
            min=1,
            max=64,
            help="With --all: processes that register adapters; by default one more than there are cores, at "
            "most 8.",
        ),
    ] = None,
    force_base: ForceBaseOption = False,
    as_json: JsonOption = False,
    *,
    place: Place,
) -> None:
    """Register a checkpoint or an adapter as a variant.

    The whole folder is checked before anything is written. Registering a name again creates its next version;
    requests in flight finish on theirs. A zoo that does not exist yet is created.

    With --server, only data that the server's zoo lacks is uploaded. A broken connection is resumed. If the
    command was interrupted, run it again: it continues where it stopped.

    With --all, each folder is a registration of its own: one that fails leaves the others as they are, and
    what is in the zoo already is found unchanged when the command is run again.

    \b
    Examples:
      blockzoo register ./SmolLM2-135M-Instruct --name smollm2
      blockzoo register ./my-lora --name support-bot --base smollm2
      blockzoo register ./my-full-fine-tune --name legal --base smollm2
      blockzoo register ./my-lora --name support-bot --base smollm2 --server models.example:7450
      blockzoo register HuggingFaceTB/SmolLM2-135M-Instruct --name smollm2
      blockzoo register --all ./my-loras --base smollm2
    """
    if every is not None:
        if folder is not None or name is not None or revision is not None:
            raise typer.BadParameter("--all has names and folders of its own: leave out those here.")
        with place.open(create=True) as zoo:
            raise typer.Exit(
                register_all(zoo, every, base, jobs=jobs, force_base=force_base, as_json=as_json)
            )
    if jobs is not None:
        raise typer.BadParameter("--jobs is for --all: one folder is registered by one process.")
    if folder is None or name is None:
        raise typer.BadParameter("Give a FOLDER and a --name, or --all with a folder of folders.")
    with progress() as reporter, place.open(create=True) as zoo:
        result = zoo.register(folder, name=name, base=base, revision=revision, progress=reporter)
    _tell_registered(result, as_json, force_base)


@at_a_place
def pull(
    model: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="A model or a LoRA adapter of the Hugging Face hub.")
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--name", "-n", metavar="NAME", help="Name of the variant; by default that of the model."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="VARIANT", help="The variant that an adapter belongs to."),
    ] = None,
    revision: RevisionOption = None,
    force_base: ForceBaseOption = False,
    as_json: JsonOption = False,
    *,
    place: Place,
) -> None:
    """Fetch a model from the Hugging Face hub and register it.

    Fetched are safetensors, configs, tokenizer and templates, into the cache of huggingface_hub (HF_HOME);
    what is there is not fetched again, and without a connection the cache answers. The commit becomes part of
    the provenance. HF_TOKEN opens private and gated models, HF_ENDPOINT names another hub.

    \b
    Examples:
      blockzoo pull HuggingFaceTB/SmolLM2-135M-Instruct --name smollm2
      blockzoo pull someone/my-lora --base smollm2
      blockzoo pull someone/my-model --revision v2
    """
    from blockzoo.folders.hub import is_hub_id

    if not is_hub_id(model):
        raise typer.BadParameter(f"{model} is no id of a model at the hub: write ORG/NAME.")
    with progress() as reporter, place.open(create=True) as zoo:
        named = name or model.rpartition("/")[2]
        result = zoo.register(model, name=named, base=base, revision=revision, progress=reporter)
    _tell_registered(result, as_json, force_base)


@at_a_place
def export(
    ref: RefArgument,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder that does not exist yet, or is empty.")
    ],
    as_json: JsonOption = False,
    *,
    place: Place,
) -> None:
    """Write a variant back as the folder it was registered from, tensor bytes identical.

    The folder appears when it is complete. With --server it is written on this machine: every tensor is
    checked against its digest before it is written, and a broken connection is taken up again.

    \b
    Examples:
      blockzoo export legal ./legal-checkpoint
      blockzoo export support-bot@1 ./support-bot-v1
      blockzoo export legal ./legal-checkpoint --server 127.0.0.1:7450
    """
    with progress() as reporter, place.open() as zoo:
        result = zoo.export(ref, folder, progress=reporter)
    if as_json:
        print_json(result.to_json())
    else:
        print_exported(result)


@at_a_place
def rm(ref: RefArgument, yes: YesOption = False, as_json: JsonOption = False, *, place: Place) -> None:
    """Remove a variant with all its versions, or one old version of it.

    `blockzoo gc` frees the bytes afterwards. Blocks that other variants use stay: variants that were
    registered on this one keep working. A damaged variant can be removed as well.

    \b
    Examples:
      blockzoo rm support-bot
      blockzoo rm support-bot@1 --yes
    """
    from blockzoo.names import parse_ref

    name, version = parse_ref(ref)
    with place.open() as zoo:
        versions = _versions_to_remove(zoo, ref)
        dependants = zoo.dependants(name)
        question = f"Remove version {version} of {name}?" if version else f"Remove {name} with {versions}?"
        confirm(f"{dependence(dependants)}{question}", yes=yes)
        report = zoo.rm(ref)
    if as_json:
        print_json({**report.to_json(), "dependants": dependants})
        return
    print_removed(report, dependants)


def _versions_to_remove(zoo: Zoo | RemoteZoo, ref: str) -> str:
    """The versions in words; raises VariantNotFoundError. Of a damaged variant the number is not known."""
    from blockzoo.errors import BlobNotFoundError, CorruptionError, ManifestNotFoundError

    try:
        zoo.resolve(ref)
        count = len(zoo.show(ref).versions)
    except (CorruptionError, BlobNotFoundError, ManifestNotFoundError):
        return "all its versions (it is damaged)"
    return "its one version" if count == 1 else f"all {count} versions"


@at_a_place
def rollback(
    name: NameArgument,
    to: Annotated[
        int | None,
        typer.Option("--to", metavar="N", min=1, help="The version to go to. [default: one further back]"),
    ] = None,
    as_json: JsonOption = False,
    *,
    place: Place,
) -> None:
    """Make an older version current again.

    Versions never change: this adds a new version that points at the old chain. Each further rollback goes
    one version further back; --to goes to any version, forward too. `blockzoo show NAME` lists the versions.

    \b
    Examples:
      blockzoo rollback support-bot
      blockzoo rollback support-bot --to 2
    """
    with place.open() as zoo:
        record = zoo.rollback(name, to)
        versions = zoo.show(name).versions
        older = [zoo.resolve(f"{name}@{version}") for version in versions[-HISTORY:]]
    if as_json:
        print_json({"name": record.name, "version": record.version, "chain": record.chain})
        return
    print_rolled_back(record, older, len(versions))


def _tell_registered(result: RegisterResult, as_json: bool, force_base: bool) -> None:
    if as_json:
        print_json(result.to_json())
    else:
        print_registered(result)
    if result.base_doubt and not force_base:
        note_doubt(result.base_doubt)
