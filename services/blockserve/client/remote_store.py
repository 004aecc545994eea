"""A server's zoo as registering sees it: `blockzoo.store.writing.WritableZoo` over the network."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from blockproto.v1 import zoo_pb2
from blockserve.client.remote_reader import RemoteSource
from blockserve.client.remote_writer import RemoteWriter
from blockserve.client.zoo_calls import Calls
from blockserve.common.wire import zoo as wire
from blockzoo.canonical import digest_bytes, parse_json
from blockzoo.errors import (
    CorruptManifestError,
    InvalidInputError,
    ManifestNotFoundError,
    VariantNotFoundError,
)
from blockzoo.manifest import BlockId, BlockManifest, ChainId, ChainManifest, JsonValue, VariantRecord
from blockzoo.manifest_json import block_from_json, chain_from_json
from blockzoo.reports.values import VariantRow

PATIENCE_S = 120.0
"""Seconds without progress after which a push gives up: a server is started again within that."""


class RemoteStore:
    """A zoo behind a server.

    Args:
        calls: the connection.
        patience_s: seconds a push goes on trying while nothing moves.
    """

    def __init__(self, calls: Calls, *, patience_s: float = PATIENCE_S) -> None:
        self.calls = calls
        self._patience_s = patience_s
        self._refs: dict[ChainId, str] = {}
        self._chains: dict[ChainId, ChainManifest] = {}
        self._blocks: dict[BlockId, BlockManifest] = {}

    @cached_property
    def description(self) -> zoo_pb2.DescribeZooResponse:
        """What the server says about its zoo."""
        described: zoo_pb2.DescribeZooResponse = self.calls.call("DescribeZoo", zoo_pb2.DescribeZooRequest())
        return described

    @property
    def remembered(self) -> RemoteStore:
        """See `WritableZoo`: nothing is asked twice."""
        return self

    def check_writable(self) -> None:
        """Reach the server before a hundred gigabytes are hashed for it; it checks the rest itself."""
        _ = self.description

    def resolve(self, name: str, version: int | None = None) -> VariantRecord:
        """See `WritableZoo`."""
        ref = name if version is None else f"{name}@{version}"
        answer = self.calls.call("GetVariant", zoo_pb2.GetVariantRequest(ref=ref))
        record = wire.record_from_message(answer.record)
        self._refs[record.chain] = f"{record.name}@{record.version}"
        return record

    def current(self, name: str) -> VariantRecord | None:
        """See `WritableZoo`."""
        try:
            return self.resolve(name)
        except VariantNotFoundError:
            return None

    def names(self) -> list[str]:
        """See `WritableZoo`."""
        return [row.name for row in self.rows()]

    def rows(self) -> list[VariantRow]:
        """The current version of every variant, with sizes."""
        parts = self.calls.stream("ListVariants", zoo_pb2.ListVariantsRequest())
        return [wire.from_message(row, VariantRow) for part in parts for row in part.rows]

    def get_chain(self, chain: ChainId) -> ChainManifest:
        """A chain of a variant that was resolved here; raises ManifestNotFoundError for another."""
        if chain not in self._chains:
            self._fetch(chain)
        return self._chains[chain]

    def get_block(self, block: BlockId) -> BlockManifest:
        """A block of a chain that was read here; raises ManifestNotFoundError for another."""
        if block not in self._blocks:
            raise ManifestNotFoundError(f"block {block} was not read from the server", digest=block)
        return self._blocks[block]

    def registration(self, purpose: str, *, on_bytes: Callable[[int], None] | None = None) -> RemoteWriter:
        """Begin to write."""
        described = self.description
        return RemoteWriter(
            self.calls,
            purpose,
            piece_bytes=described.max_piece_bytes,
            max_digests=described.max_digests,
            patience_s=self._patience_s,
            on_bytes=on_bytes,
            current=self.current,
        )

    def source(self, record: VariantRecord) -> RemoteSource:
        """What an export of a version that was resolved here reads."""
        return RemoteSource(
            self.calls,
            self,
            f"{record.name}@{record.version}",
            max_digests=self.description.max_digests,
            patience_s=self._patience_s,
        )

    def _fetch(self, chain: ChainId) -> None:
        if chain not in self._refs:
            raise ManifestNotFoundError(
                f"chain {chain} belongs to none of the variants that were asked for", digest=chain
            )
        answer = self.calls.call("GetManifests", zoo_pb2.GetManifestsRequest(ref=self._refs[chain]))
        if digest_bytes(answer.chain) != chain:
            raise CorruptManifestError(f"the server sent another chain than {chain}", digest=chain)
        for body in answer.blocks:
            self._blocks[BlockId(digest_bytes(body))] = block_from_json(_parse(body))
        self._chains[chain] = chain_from_json(_parse(answer.chain))


def _parse(body: bytes) -> JsonValue:
    try:
        return parse_json(body)
    except InvalidInputError as error:
        raise CorruptManifestError(f"the server sent a manifest that cannot be read: {error}") from error
