"""Adapters that a request names by where they lie: `BASE+path:/FOLDER` or `BASE+hub:ORG/NAME@REVISION`.

The operator lists folders and models of the hub that may be named so (`allow_unregistered`). The first
request registers such an adapter under a reserved name, which is made of base and place; others wait for the
same registration. Beyond `max_unregistered` the least recently named ones are removed from the zoo again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from blockserve.common.errors import ConfigurationError, QueueFullError, UnregisteredRefusedError
from blockzoo.errors import AdapterError, BlockzooError, InvalidNameError, VariantNotFoundError
from blockzoo.folders.files import ADAPTER_CONFIG
from blockzoo.manifest import VariantRecord
from blockzoo.names import RESERVED_PREFIX
from blockzoo.store.objects import OnDamage, ignore_damage

if TYPE_CHECKING:
    from blockserve.router.limits import UnregisteredSettings
    from blockzoo.registering.job import RegisterResult
    from blockzoo.zoo import Zoo

log = logging.getLogger(__name__)

SIGN = "+"
"""Stands between base and place; no name of a variant has it."""
PATH, HUB = "path", "hub"
RETRY_AFTER_S = 5.0
_MAX_LEN = 4096
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HINT = "Write BASE+path:/FOLDER or BASE+hub:ORG/NAME@REVISION, as smollm2+path:/adapters/support-bot."


class AdapterZoo(Protocol):
    """The part of `blockzoo.zoo.Zoo` that is needed here. Blocking, safe to call from several threads."""

    def variants(self, on_damage: OnDamage | None = None) -> Sequence[VariantRecord]:
        """The current version of every name."""
        ...

    def resolve(self, ref: str) -> VariantRecord:
        """A version (VariantNotFoundError)."""
        ...

    def versions(self, name: str) -> Sequence[VariantRecord]:
        """All versions of a name, the current one last."""
        ...

    def register(
        self, path: str | Path, *, name: str, base: str | None, revision: str | None, on_demand: bool
    ) -> RegisterResult:
        """Register a folder or a model of the hub."""
        ...

    def rm(self, ref: str) -> object:
        """Remove a variant, or an old version of it."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where an adapter lies: a folder, or a model of the hub at a revision."""

    kind: str
    source: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class _Look:
    """What a request named, as it is now.

    Attributes:
        name: reserved name of this base and place.
        base: the base, `name@version`.
        place: a folder with its links resolved, or a model of the hub.
        stamp: changes with the files of a folder.
        record: what the zoo has under the name.
    """

    name: str
    base: str
    place: Place
    stamp: tuple[object, ...]
    record: VariantRecord | None


def unregistered_adapters(zoo: Zoo, settings: UnregisteredSettings) -> UnregisteredAdapters | None:
    """The adapters that the operator allows; None without any. Blocking; raises as `UnregisteredAdapters`."""
    if not settings.allow_unregistered:
        return None
    zoo.store.check_writable()
    return UnregisteredAdapters(zoo, settings.allow_unregistered, settings.max_unregistered)


def parse_place(text: str) -> Place:
    """`path:/FOLDER` or `hub:ORG/NAME[@REVISION]`; raises InvalidNameError."""
    from blockzoo.folders.hub import is_hub_id

    kind, _, source = text.partition(":")
    if len(text) <= _MAX_LEN and "\0" not in text:
        if kind == PATH and source.startswith("/"):
            return Place(PATH, source)
        repo, at, revision = source.partition("@")
        if kind == HUB and is_hub_id(repo) and (not at or _REVISION.fullmatch(revision)):
            return Place(HUB, repo, revision or None)
    raise InvalidNameError(f"{text[:200]!r} does not say where an adapter lies", hint=_HINT, name=text[:200])


def refuse(ref: str, why: str = "this server takes registered variants only") -> UnregisteredRefusedError:
    """The error for an adapter that may not be named by its place; says nothing of what exists there."""
    return UnregisteredRefusedError(
        f"{ref[:200]!r} cannot be named here: {why}",
        hint="Register it with `blockzoo register` and name the variant, or ask the operator to list it in "
        "`--allow-unregistered`.",
        name=ref[:200],
    )


class UnregisteredAdapters:
    """Registers what requests name, and removes what they have not named for longest. One event loop."""

    def __init__(self, zoo: AdapterZoo, allowed: Sequence[str], most: int) -> None:
        """Blocking: looks for what an earlier process has left in the zoo.

        Args:
            zoo: where adapters are registered.
            allowed: folders with all that is below them, and models of the hub, `hub:ORG/NAME[@REVISION]`.
            most: number of adapters that are kept.

        Raises:
            ConfigurationError: an entry of `allowed` is neither a folder nor a model of the hub.
        """
        self._zoo = zoo
        self._folders = [_folder(text) for text in allowed if not text.startswith(f"{HUB}:")]
        self._models = [_model(text) for text in allowed if text.startswith(f"{HUB}:")]
        self._most = most
        known = (record.name for record in zoo.variants(ignore_damage))
        self._used = OrderedDict.fromkeys(str(name) for name in known if name.startswith(RESERVED_PREFIX))
        self._stamps: dict[str, tuple[object, ...]] = {}
        self._pending: dict[str, asyncio.Task[str]] = {}
        # One at a time of each kind: registering takes memory and cores, and the hub may take long.
        self._turns = {PATH: asyncio.Lock(), HUB: asyncio.Lock()}

    async def ref_of(self, ref: str) -> str:
        """Return `name@version` of the adapter that `BASE+PLACE` names, registered if need be.

        Raises:
            InvalidNameError: it is spelled wrong.
            UnregisteredRefusedError: the operator does not allow it.
            VariantNotFoundError: there is no such base.
            AdapterError, HubModelNotFoundError, HubUnreachableError: there is no such adapter, or it
                cannot be served; see `blockzoo.registering.folder.register_folder`.
            QueueFullError: too many others are being registered.
        """
        look = await asyncio.to_thread(self._look, ref)
        if look.record is not None and self._stamps.get(look.name) == look.stamp:
            self._touch(look.name)
            return f"{look.name}@{look.record.version}"
        task = self._pending.get(look.name)
        if task is None:
            if len(self._pending) >= self._most:
                raise QueueFullError(
                    f"{len(self._pending)} adapters are being registered", retry_after=RETRY_AFTER_S
                )
            task = self._pending[look.name] = asyncio.create_task(self._register(look))
            task.add_done_callback(lambda done: self._ended(look.name, done))
        # A caller that goes away does not end the registration that others wait for.
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Stop waiting for registrations; one that runs in a thread ends by itself."""
        tasks = [*self._pending.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, name: str, task: asyncio.Task[str]) -> None:
        self._pending.pop(name, None)
        if not task.cancelled():
            task.exception()  # seen, even if every caller is gone

    def _touch(self, name: str) -> None:
        self._used[name] = None
        self._used.move_to_end(name)

    def _look(self, ref: str) -> _Look:
        base_ref, _, text = ref.partition(SIGN)
        place = self._allowed(ref, parse_place(text))
        record = self._zoo.resolve(base_ref)
        base = f"{record.name}@{record.version}"
        stamp = _stamp(Path(place.source)) if place.kind == PATH else ()
        key = "\n".join((base, place.kind, place.source, place.revision or ""))
        name = RESERVED_PREFIX + hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32]
        try:
            return _Look(name, base, place, stamp, self._zoo.resolve(name))
        except VariantNotFoundError:
            return _Look(name, base, place, stamp, None)

    def _allowed(self, ref: str, place: Place) -> Place:
        """The place with links resolved and the operator's revision, if it may be named."""
        if place.kind == PATH:
            real = Path(os.path.realpath(place.source))
            if any(real.is_relative_to(folder) for folder in self._folders):
                return Place(PATH, str(real))
            raise refuse(ref, "its folder is not one that the operator lists")
        for model in self._models:
            if model.source == place.source and model.revision in (None, place.revision):
                return place
        for model in self._models:
            if model.source == place.source and place.revision is None:
                return model
        raise refuse(ref, "the operator does not list this model of the hub at this revision")

    async def _register(self, look: _Look) -> str:
        async with self._turns[look.place.kind]:
            record = await asyncio.to_thread(self._register_blocking, look)
        self._stamps[look.name] = look.stamp
        self._touch(look.name)
        log.info("adapter registered on demand variant=%s@%d base=%s source=%s",
                 record.name, record.version, look.base, look.place.source)  # fmt: skip
        await asyncio.to_thread(self._remove_old_versions, record)
        await self._evict()
        return f"{record.name}@{record.version}"

    def _register_blocking(self, look: _Look) -> VariantRecord:
        place = look.place
        from blockzoo.folders.hub import find_folder

        found = find_folder(place.source, place.revision) if place.kind == HUB else None
        folder = Path(place.source) if found is None else found.path
        if not (folder / ADAPTER_CONFIG).is_file():
            raise AdapterError(
                f"{place.source} is no adapter: it has no {ADAPTER_CONFIG}",
                hint="Only adapters can be named by their place. Register a checkpoint.",
            )
        revision = None if found is None else found.origin.get("revision", place.revision)
        result = self._zoo.register(
            place.source, name=look.name, base=look.base, revision=revision, on_demand=True
        )
        return result.record

    def _remove_old_versions(self, current: VariantRecord) -> None:
        """Leave one version before the current one, for requests that looked a moment ago."""
        try:
            for record in self._zoo.versions(current.name):
                if record.version < current.version - 1:
                    self._zoo.rm(f"{record.name}@{record.version}")
        except BlockzooError as error:
            log.warning("old version not removed variant=%s reason=%s: %s",
                        current.name, error.reason, error)  # fmt: skip

    async def _evict(self) -> None:
        for name in [*self._used]:
            if len(self._used) <= self._most:
                return
            if name in self._pending:
                continue
            del self._used[name]
            self._stamps.pop(name, None)
            try:
                await asyncio.to_thread(self._zoo.rm, name)
            except BlockzooError as error:
                log.warning("adapter not removed variant=%s reason=%s: %s", name, error.reason, error)
            else:
                log.info("adapter removed, others were named later variant=%s", name)


def _folder(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise ConfigurationError(
            f"allow_unregistered: {text} is no folder",
            hint="Name a folder that exists, or a model of the hub as hub:ORG/NAME.",
        )
    return Path(os.path.realpath(path))


def _model(text: str) -> Place:
    try:
        return parse_place(text)
    except InvalidNameError as error:
        raise ConfigurationError(
            f"allow_unregistered: {text} is no model of the hub",
            hint="Write hub:ORG/NAME or hub:ORG/NAME@REVISION.",
        ) from error


def _stamp(folder: Path) -> tuple[object, ...]:
    """What changes with the files of an adapter's folder."""
    try:
        with os.scandir(folder) as entries:
            facts = [(entry.name, entry.stat()) for entry in entries]
    except OSError as error:
        raise AdapterError(
            f"{folder} cannot be read: {error.strerror}", hint="Check the path at the server."
        ) from error
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in facts))
