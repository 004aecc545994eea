"""Names to what is served: the zoo's variants with everything the edge needs to know about them."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from blockserve.common.api.calls import Conversation
from blockserve.common.errors import PromptError, PromptTooLongError
from blockserve.router.intake.chat import ChatTemplates
from blockserve.router.intake.texts import TextThreads, check_beginning, check_text, size_of
from blockserve.router.intake.tokenizer import TokenizerCache, VariantTokenizer, refuse_size
from blockserve.router.intake.unregistered import SIGN, UnregisteredAdapters, refuse
from blockserve.router.intake.variant_files import TokenizerSource, VariantFiles
from blockserve.router.limits import RouterConfig
from blockzoo.errors import BlockzooError, VariantNotFoundError
from blockzoo.folders.generation import GenerationDefaults
from blockzoo.manifest import ChainId, ChainManifest, VariantRecord
from blockzoo.names import RESERVED_PREFIX
from blockzoo.storage import Stamp
from blockzoo.store.objects import DamagedRef, OnDamage, ignore_damage

log = logging.getLogger(__name__)


class ZooReader(Protocol):
    """The part of `blockzoo.zoo.Zoo` that the edge reads. Blocking, safe to call from several threads."""

    @property
    def url(self) -> str:
        """Where the zoo is."""
        ...

    def variants(self, on_damage: OnDamage | None = None) -> Sequence[VariantRecord]:
        """The current version of every name; damaged refs raise, or are told to `on_damage`."""
        ...

    def resolve(self, ref: str) -> VariantRecord:
        """The variant of `name` or `name@version` (VariantNotFoundError, InvalidNameError)."""
        ...

    def stamp(self, ref: str) -> Stamp | None:
        """What changes whenever `ref` may name another version, None where only `resolve` tells; at once."""
        ...

    def chain(self, chain: ChainId) -> ChainManifest:
        """A chain's manifest."""
        ...

    def read_file(self, record: VariantRecord, filename: str) -> bytes:
        """A small file's bytes (NotFoundError)."""
        ...


@dataclass(frozen=True, slots=True)
class ServedVariant:
    """One version of a variant, resolved; immutable, so a request keeps it to its end.

    Attributes:
        record: what the zoo holds.
        chain: the manifest of its chain.
        defaults: what its generation_config.json asks for.
        templates: its chat templates.
        tokenizer: what its tokenizer is made of, None when it was registered without one.
    """

    record: VariantRecord
    chain: ChainManifest
    defaults: GenerationDefaults
    templates: ChatTemplates
    tokenizer: TokenizerSource | None

    @property
    def ref(self) -> str:
        """`name@version`."""
        return f"{self.record.name}@{self.record.version}"


@dataclass(frozen=True, slots=True)
class DamagedVariant:
    """A variant in a list that cannot be served; the others in the list can.

    Attributes:
        record: what the zoo holds.
        error: why it cannot be served.
    """

    record: VariantRecord
    error: BlockzooError


@dataclass(frozen=True, slots=True)
class _Look:
    """What a name meant, when, and the zoo's stamp of it just before."""

    at: float
    stamp: Stamp | None
    record: VariantRecord


class VariantCatalog:
    """Variants as requests name them.

    A request gets the version that its name has when it comes in: it is looked up again where the zoo's stamp
    of the name has changed, or where there is none (or once in `refresh_seconds`). What belongs to one
    version never changes and is kept.
    """

    def __init__(
        self,
        zoo: ZooReader,
        limits: RouterConfig | None = None,
        *,
        unregistered: UnregisteredAdapters | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make one; `unregistered` registers adapters that are named by their place, None refuses them."""
        self._zoo = zoo
        self._unregistered = unregistered
        self._limits = limits or RouterConfig()
        self._clock = clock
        self._tokenizers = TokenizerCache(self._limits.cached_tokenizers)
        self._texts = TextThreads(self._limits.long_text_bytes)
        self._lock = threading.Lock()
        self._served: OrderedDict[tuple[str, int, ChainId], ServedVariant] = OrderedDict()
        self._current: dict[str, _Look] = {}

    @property
    def zoo_url(self) -> str:
        """Where the zoo is."""
        return self._zoo.url

    def close(self) -> None:
        """End the thread for long texts."""
        self._texts.close()

    def forget(self, name: str) -> None:
        """Look a name up again at its next request: it was changed just now."""
        with self._lock:
            for ref in [ref for ref in self._current if ref.partition("@")[0] == name]:
                del self._current[ref]

    async def get(self, ref: str) -> ServedVariant:
        """Resolve `name`, `name@version` or, where the operator allows it, `base+place` of an adapter.

        Raises:
            VariantNotFoundError: no such variant; the hint has near names.
            InvalidNameError: not a name.
            UnregisteredRefusedError: an adapter that may not be named by its place.
            AdapterError: one that cannot be served; see `UnregisteredAdapters.ref_of`.
        """
        if SIGN in ref:
            return await self._get_unregistered(ref)
        if (known := self._known(ref)) is not None:
            return known
        return await asyncio.to_thread(self.get_blocking, ref)

    async def _get_unregistered(self, ref: str) -> ServedVariant:
        if self._unregistered is None:
            raise refuse(ref)
        try:
            return await self.get(await self._unregistered.ref_of(ref))
        except VariantNotFoundError as error:
            if not str(error.metadata.get("variant", "")).startswith(RESERVED_PREFIX):
                raise
            # It was removed between the two, by this server or by another one of the same zoo.
            return await self.get(await self._unregistered.ref_of(ref))

    async def tokenizer(self, variant: ServedVariant) -> VariantTokenizer | None:
        """The variant's tokenizer, None when it was registered without one.

        Raises:
            PromptError: its tokenizer.json cannot be used.
        """
        source = variant.tokenizer
        if source is None:
            return None
        # Handing work to a thread costs a request more than most other steps before the engine.
        return self._tokenizers.ready(source.key) or await asyncio.to_thread(self.tokenizer_blocking, variant)

    async def encode(self, variant: ServedVariant, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of a text by the variant's tokenizer.

        Raises:
            PromptError: it has none, or its tokenizer.json cannot be used.
            PromptTooLongError: the text is longer than the context, whatever its tokens; or its beginning is.
        """
        tokenizer = await self._needed_tokenizer(variant)
        size = size_of(text)
        await self._check_size(size, variant, tokenizer)
        context = variant.chain.context_length

        def encode() -> tuple[int, ...]:
            check_beginning(text, size, variant.ref, context, tokenizer.count)
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)

        try:
            return await self._texts.run(size, encode)
        except PromptTooLongError:
            await self._texts.pause(size)
            raise

    async def check_conversation(self, variant: ServedVariant, conversation: Conversation) -> None:
        """Refuse a conversation whose text is too long for any template, before one is rendered.

        Raises:
            PromptError: as `encode`.
        """
        tokenizer = await self._needed_tokenizer(variant)
        parts = (conversation.messages, conversation.tools, conversation.documents, conversation.variables)
        size = sum(map(size_of, parts))
        await self._check_size(size, variant, tokenizer)

    async def _check_size(self, size: int, variant: ServedVariant, tokenizer: VariantTokenizer) -> None:
        try:
            check_text(size, variant.ref, variant.chain.context_length, tokenizer.longest_token)
        except PromptTooLongError:
            await self._texts.pause(size)
            raise

    async def _needed_tokenizer(self, variant: ServedVariant) -> VariantTokenizer:
        tokenizer = await self.tokenizer(variant)
        if tokenizer is None:
            raise PromptError(
                f"{variant.ref} was registered without a tokenizer.json", hint="Send token ids."
            )
        return tokenizer

    async def page(self, after: str, size: int) -> tuple[list[ServedVariant | DamagedVariant], bool]:
        """Current versions in the order of their names.

        Args:
            after: names greater than this one; "" for the first page.
            size: at most so many.

        Returns:
            The page, and whether more follow.
        """

        def work() -> tuple[list[ServedVariant | DamagedVariant], bool]:
            damaged: dict[str, DamagedVariant] = {}
            known = self._by_name(lambda ref: damaged.update({ref.name: _of_damaged_ref(ref)}))
            records = [record for record in known if record.name > after]
            records += [one.record for name, one in damaged.items() if name > after]
            records.sort(key=lambda record: record.name)
            page = [damaged.get(record.name) or self._or_damaged(record) for record in records[:size]]
            return page, len(records) > size

        return await asyncio.to_thread(work)

    async def refs_by_chain(self) -> dict[ChainId, tuple[str, ...]]:
        """The variants (`name@version`) on each chain: current versions, and older ones in use."""

        def work() -> dict[ChainId, tuple[str, ...]]:
            with self._lock:
                known = [variant.record for variant in self._served.values()]
            refs: dict[ChainId, set[tuple[str, int]]] = {}
            for record in (*self._by_name(), *known):
                refs.setdefault(record.chain, set()).add((record.name, record.version))
            return {
                chain: tuple(f"{name}@{version}" for name, version in sorted(pairs))
                for chain, pairs in refs.items()
            }

        return await asyncio.to_thread(work)

    def get_blocking(self, ref: str) -> ServedVariant:
        """`get` for threads."""
        return self._served_variant(self._record(ref))

    def tokenizer_blocking(self, variant: ServedVariant) -> VariantTokenizer | None:
        """`tokenizer` for threads."""
        source = variant.tokenizer
        if source is None:
            return None

        def make() -> VariantTokenizer:
            refuse_size(variant.record.files[source.filename].size)  # before so much is read
            return VariantTokenizer.from_bytes(
                self._zoo.read_file(variant.record, source.filename), source.facts
            )

        return self._tokenizers.get(source.key, make)

    def _by_name(self, on_damage: OnDamage = ignore_damage) -> list[VariantRecord]:
        return sorted(self._zoo.variants(on_damage), key=lambda record: record.name)

    def _known(self, ref: str) -> ServedVariant | None:
        """What a name means, where that was looked up lately and nothing has to be read."""
        record = self._fresh_record(ref)
        if record is None:
            return None
        return self._served_already((record.name, record.version, record.chain))

    def _served_already(self, key: tuple[str, int, ChainId]) -> ServedVariant | None:
        with self._lock:
            known = self._served.get(key)
            if known is not None:
                self._served.move_to_end(key)
            return known

    def _fresh_record(self, ref: str) -> VariantRecord | None:
        with self._lock:
            seen = self._current.get(ref)
        if seen is None:
            return None
        is_fresh = self._clock() - seen.at < self._limits.refresh_seconds
        if is_fresh or (seen.stamp is not None and seen.stamp == self._zoo.stamp(ref)):
            return seen.record
        return None

    def _record(self, ref: str) -> VariantRecord:
        if (fresh := self._fresh_record(ref)) is not None:
            return fresh
        # Asked before the look: what changes in between changes the stamp.
        now, stamp = self._clock(), self._zoo.stamp(ref)
        record = self._zoo.resolve(ref)
        with self._lock:
            if len(self._current) >= self._limits.cached_variants:
                self._current.clear()
            self._current[ref] = _Look(now, stamp, record)
        return record

    def _served_variant(self, record: VariantRecord) -> ServedVariant:
        key = (record.name, record.version, record.chain)
        if (known := self._served_already(key)) is not None:
            return known
        served = self._describe(record)
        with self._lock:
            self._served[key] = served
            while len(self._served) > self._limits.cached_variants:
                self._served.popitem(last=False)
        return served

    def _or_damaged(self, record: VariantRecord) -> ServedVariant | DamagedVariant:
        try:
            return self._served_variant(record)
        except BlockzooError as error:
            log.warning("variant %s@%d is damaged: %s", record.name, record.version, error)
            return DamagedVariant(record, error)

    def _describe(self, record: VariantRecord) -> ServedVariant:
        def read(filename: str) -> bytes:
            return self._zoo.read_file(record, filename)

        chain = self._zoo.chain(record.chain)
        files = VariantFiles(record, read)
        return ServedVariant(
            record,
            chain,
            files.generation_defaults(chain.vocab_size),
            files.chat_templates(),
            files.tokenizer(),
        )


def _of_damaged_ref(ref: DamagedRef) -> DamagedVariant:
    log.warning("variant %s@%d is damaged: %s", ref.name, ref.version, ref.error)
    return DamagedVariant(VariantRecord(ref.name, ref.version, ChainId(""), "damaged", {}, {}), ref.error)
