"""The gRPC face of the zoo: a message in, a value to the zoo or a push, a message out.

Errors are raised as they are; `common.rpc.interceptors.ErrorInterceptor` translates them. Whatever touches
the storage runs in threads of the servicer's own, so that answers of variants do not wait for pushes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeVar

from blockproto.v1 import zoo_pb2, zoo_pb2_grpc
from blockserve.common.api.push import Standing
from blockserve.common.wire import equivalence as equivalence_wire
from blockserve.common.wire import zoo as wire
from blockserve.controller.push.commit import Wish
from blockserve.controller.push.exports import Exports
from blockserve.controller.push.limits import ControllerConfig
from blockserve.controller.push.operations import Done, run_operation
from blockserve.controller.push.pushes import Pushes
from blockzoo.care import gc
from blockzoo.errors import InvalidInputError
from blockzoo.names import parse_ref
from blockzoo.zoo import Zoo

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_GRACE_SECONDS = 86_400.0
"""A day: longer than any load of a variant."""

ROWS_PER_MESSAGE = 500
"""Rows of ListVariants in one message; a few hundred bytes each."""

MAX_REF_CHARS = 200
"""Of what a caller wrote, in the log."""

EQUIVALENCE_BYTES = 256 << 10
"""A message of ListEquivalence ends with the report that fills it; one takes some kilobytes."""


class ZooServicer(zoo_pb2_grpc.ZooServiceServicer):
    """`blockproto.v1.ZooService`."""

    def __init__(
        self, zoo: Zoo, config: ControllerConfig, *, on_change: Callable[[str], None] = lambda _: None
    ) -> None:
        """Serve a zoo; `on_change` is told the name of each variant that was changed through this."""
        self._zoo = zoo
        self._config = config
        self._on_change = on_change
        self._pushes = Pushes(zoo.store, config)
        self._exports = Exports(zoo, config)
        self._pool = ThreadPoolExecutor(config.zoo_threads, thread_name_prefix="blockzoo-network")

    async def close(self) -> None:
        """Give up the pushes that are open; the pushers ask again when there is a server again."""
        await self._run(self._pushes.close)
        self._pool.shutdown(wait=False)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def DescribeZoo(  # noqa: N802 - the generated name
        self, request: zoo_pb2.DescribeZooRequest, context: Any
    ) -> zoo_pb2.DescribeZooResponse:
        """Where the zoo is, and how much one call may carry."""
        del request, context
        return zoo_pb2.DescribeZooResponse(
            zoo_url=self._zoo.url,
            max_piece_bytes=self._config.max_piece_bytes,
            max_digests=self._config.max_digests,
        )

    async def ListVariants(  # noqa: N802
        self, request: zoo_pb2.ListVariantsRequest, context: Any
    ) -> AsyncIterator[zoo_pb2.ListVariantsResponse]:
        """The current version of every variant."""
        del request, context
        rows = await self._run(self._zoo.ls)
        for start in range(0, len(rows), ROWS_PER_MESSAGE):
            part = rows[start : start + ROWS_PER_MESSAGE]
            yield zoo_pb2.ListVariantsResponse(rows=[wire.to_message(row) for row in part])

    async def GetVariant(  # noqa: N802
        self, request: zoo_pb2.GetVariantRequest, context: Any
    ) -> zoo_pb2.GetVariantResponse:
        """The record of one version."""
        del context
        record = await self._run(lambda: self._zoo.resolve(request.ref))
        return zoo_pb2.GetVariantResponse(record=wire.record_to_message(record))

    async def GetManifests(  # noqa: N802
        self, request: zoo_pb2.GetManifestsRequest, context: Any
    ) -> zoo_pb2.GetManifestsResponse:
        """A variant's chain and its blocks."""
        del context
        chain, blocks = await self._run(lambda: self._zoo.manifests(request.ref))
        return zoo_pb2.GetManifestsResponse(chain=chain, blocks=blocks)

    async def ShowVariant(  # noqa: N802
        self, request: zoo_pb2.ShowVariantRequest, context: Any
    ) -> zoo_pb2.ShowVariantResponse:
        """All about one version."""
        del context
        report = await self._run(lambda: self._zoo.show(request.ref))
        return zoo_pb2.ShowVariantResponse(report=wire.to_message(report))

    async def GetUsage(  # noqa: N802
        self, request: zoo_pb2.GetUsageRequest, context: Any
    ) -> zoo_pb2.GetUsageResponse:
        """What everything takes."""
        del request, context
        return zoo_pb2.GetUsageResponse(report=wire.to_message(await self._run(self._zoo.du)))

    async def RemoveVariant(  # noqa: N802
        self, request: zoo_pb2.RemoveVariantRequest, context: Any
    ) -> zoo_pb2.RemoveVariantResponse:
        """Remove a variant or an old version."""
        del context
        report = await self._run(lambda: self._zoo.rm(request.ref))
        self._on_change(report.name)
        return zoo_pb2.RemoveVariantResponse(report=wire.to_message(report))

    async def RollbackVariant(  # noqa: N802
        self, request: zoo_pb2.RollbackVariantRequest, context: Any
    ) -> zoo_pb2.RollbackVariantResponse:
        """Make an older version current again."""
        del context
        to = request.to if request.HasField("to") else None
        record = await self._run(lambda: self._zoo.rollback(request.name, to))
        self._on_change(record.name)
        return zoo_pb2.RollbackVariantResponse(record=wire.record_to_message(record))

    async def CollectGarbage(  # noqa: N802
        self, request: zoo_pb2.CollectGarbageRequest, context: Any
    ) -> AsyncIterator[zoo_pb2.CollectGarbageResponse]:
        """Delete what no variant needs."""
        del context
        grace_s = request.grace_seconds if request.HasField("grace_seconds") else gc.GRACE_S
        if not 0 <= grace_s <= MAX_GRACE_SECONDS:
            raise InvalidInputError(
                f"grace_seconds: {grace_s} is not within 0 to {MAX_GRACE_SECONDS}", field="grace_seconds"
            )
        steps = run_operation(
            lambda progress: self._zoo.gc(grace_s=grace_s, dry_run=request.dry_run, progress=progress)
        )
        async with aclosing(steps):
            async for step in steps:
                if isinstance(step, Done):
                    yield zoo_pb2.CollectGarbageResponse(report=wire.to_message(step.result))
                else:
                    yield zoo_pb2.CollectGarbageResponse(progress=wire.step_to_message(step))

    async def VerifyZoo(  # noqa: N802
        self, request: zoo_pb2.VerifyZooRequest, context: Any
    ) -> AsyncIterator[zoo_pb2.VerifyZooResponse]:
        """Read everything back."""
        del request, context
        steps = run_operation(lambda progress: self._zoo.verify(progress=progress))
        async with aclosing(steps):
            async for step in steps:
                if isinstance(step, Done):
                    yield zoo_pb2.VerifyZooResponse(report=wire.to_message(step.result))
                else:
                    yield zoo_pb2.VerifyZooResponse(progress=wire.step_to_message(step))

    async def DownloadBlobs(  # type: ignore[override]  # noqa: N802 - as in the router's Generate
        self, request: zoo_pb2.DownloadBlobsRequest, context: Any
    ) -> None:
        """Send what a version is made of, one message after the other: none is read before its turn."""
        self._check_count(len(request.blobs))
        blobs = [wire.blob_from_message(blob) for blob in request.blobs]
        call = asyncio.current_task()
        assert call is not None
        export = self._exports.begin(call.cancel)
        log.info("export ref=%r blobs=%d peer=%s", request.ref[:MAX_REF_CHARS], len(blobs), context.peer())
        messages = self._exports.messages(request.ref, blobs, request.offset)
        try:
            while (parts := await self._run(lambda: next(messages, None))) is not None:
                self._exports.move(export)
                message = zoo_pb2.DownloadBlobsResponse()
                for part in parts:
                    message.parts.add(blob=part.blob, offset=part.offset, data=part.data)
                await context.write(message)
        except asyncio.CancelledError:
            with suppress(ValueError):  # a thread reads for it at this moment
                messages.close()
            self._exports.move(export)  # tells the caller if another one took its place
            raise
        finally:
            self._exports.end(export)

    async def ListEquivalence(  # noqa: N802
        self, request: zoo_pb2.ListEquivalenceRequest, context: Any
    ) -> AsyncIterator[zoo_pb2.ListEquivalenceResponse]:
        """Every record that can be read, then which cannot."""
        del request, context
        found = await self._run(self._zoo.equivalences)
        part = zoo_pb2.ListEquivalenceResponse()
        for report in found.records:
            part.reports.append(equivalence_wire.report_to_message(report))
            if part.ByteSize() >= EQUIVALENCE_BYTES:
                yield part
                part = zoo_pb2.ListEquivalenceResponse()
        part.unreadable.update(found.unreadable)
        yield part

    async def ShowEquivalence(  # noqa: N802
        self, request: zoo_pb2.ShowEquivalenceRequest, context: Any
    ) -> zoo_pb2.ShowEquivalenceResponse:
        """One record with its decisions."""
        del context
        report = await self._run(lambda: self._zoo.equivalence(request.record))
        return zoo_pb2.ShowEquivalenceResponse(report=equivalence_wire.report_to_message(report))

    async def ApproveEquivalence(  # noqa: N802
        self, request: zoo_pb2.ApproveEquivalenceRequest, context: Any
    ) -> zoo_pb2.ApproveEquivalenceResponse:
        """Allow a measured substitute."""
        self._check_count(len(request.variants), "variants")
        decision, about = await self._run(
            lambda: self._zoo.approve_equivalence(
                request.record,
                by=request.by,
                reason=request.reason,
                max_kl=request.max_kl,
                min_agreement=request.min_agreement if request.HasField("min_agreement") else None,
                variants=tuple(request.variants),
                force=request.force,
            )
        )
        log.info("approved record=%s by=%r peer=%s", decision.record, decision.by, context.peer())
        return zoo_pb2.ApproveEquivalenceResponse(
            decision=equivalence_wire.decision_to_bytes(decision),
            record=equivalence_wire.record_to_bytes(about),
        )

    async def RevokeEquivalence(  # noqa: N802
        self, request: zoo_pb2.RevokeEquivalenceRequest, context: Any
    ) -> zoo_pb2.RevokeEquivalenceResponse:
        """End an approval."""
        decision = await self._run(
            lambda: self._zoo.revoke_equivalence(request.record, by=request.by, reason=request.reason)
        )
        log.info("revoked record=%s by=%r peer=%s", decision.record, decision.by, context.peer())
        return zoo_pb2.RevokeEquivalenceResponse(decision=equivalence_wire.decision_to_bytes(decision))

    async def BeginPush(  # noqa: N802
        self, request: zoo_pb2.BeginPushRequest, context: Any
    ) -> zoo_pb2.BeginPushResponse:
        """Begin a push."""
        del context
        push_id, push = await self._run(lambda: self._pushes.begin(request.purpose))
        return zoo_pb2.BeginPushResponse(push_id=push_id, nonce=push.nonce)

    async def FindBlobs(  # noqa: N802
        self, request: zoo_pb2.FindBlobsRequest, context: Any
    ) -> zoo_pb2.FindBlobsResponse:
        """Lease blobs and say where each stands."""
        del context
        self._check_count(len(request.blobs))
        blobs = [wire.blob_from_message(blob) for blob in request.blobs]

        def find() -> list[Standing]:
            self._pushes.drop_idle()
            return self._pushes.get(request.push_id).find(blobs)

        standings = await self._run(find)
        return zoo_pb2.FindBlobsResponse(states=[wire.standing_to_message(item) for item in standings])

    async def ProveBlobs(  # noqa: N802
        self, request: zoo_pb2.ProveBlobsRequest, context: Any
    ) -> zoo_pb2.ProveBlobsResponse:
        """Check proofs."""
        del context
        self._check_count(len(request.proofs))
        proofs = {wire.blob_from_message(proof.blob): proof.mac for proof in request.proofs}
        await self._run(lambda: self._pushes.get(request.push_id).prove(proofs))
        return zoo_pb2.ProveBlobsResponse()

    async def UploadBlobs(  # noqa: N802
        self, request_iterator: AsyncIterator[zoo_pb2.UploadBlobsRequest], context: Any
    ) -> zoo_pb2.UploadBlobsResponse:
        """Take bytes, one message after the other: the next is not read before this one is dealt with."""
        del context
        last = None
        async for request in request_iterator:
            last = push = self._pushes.get(request.push_id)
            if sum(len(piece.data) for piece in request.pieces) > self._config.max_piece_bytes:
                raise InvalidInputError(f"a message may have {self._config.max_piece_bytes} tensor bytes")
            pieces = [wire.piece_from_message(piece) for piece in request.pieces]
            await self._run(partial(push.receive_all, pieces))
        if last is not None:
            await self._run(last.settle)
        return zoo_pb2.UploadBlobsResponse()

    async def RelyOnVariant(  # noqa: N802
        self, request: zoo_pb2.RelyOnVariantRequest, context: Any
    ) -> zoo_pb2.RelyOnVariantResponse:
        """Lease what a registered variant needs."""
        del context
        push = self._pushes.get(request.push_id)
        await self._run(lambda: push.rely_on(self._zoo.store.resolve(*parse_ref(request.ref))))
        return zoo_pb2.RelyOnVariantResponse()

    async def CommitPush(  # noqa: N802
        self, request: zoo_pb2.CommitPushRequest, context: Any
    ) -> zoo_pb2.CommitPushResponse:
        """Check the manifests and make the version visible."""
        del context
        wish = Wish(
            name=request.name,
            kind=request.kind,
            chain=request.chain,
            blocks=tuple(request.blocks),
            files=wire.files_from_message(request.files),
            provenance=dict(request.provenance),
        )
        done = await self._run(lambda: self._pushes.get(request.push_id).commit(wish))
        self._on_change(done.record.name)
        return zoo_pb2.CommitPushResponse(
            record=wire.record_to_message(done.record), unchanged=done.unchanged, restored=done.restored
        )

    async def AbortPush(  # noqa: N802
        self, request: zoo_pb2.AbortPushRequest, context: Any
    ) -> zoo_pb2.AbortPushResponse:
        """Give a push up."""
        del context
        await self._run(lambda: self._pushes.end(request.push_id))
        return zoo_pb2.AbortPushResponse()

    def _check_count(self, count: int, what: str = "digests") -> None:
        if count > self._config.max_digests:
            raise InvalidInputError(f"{count} {what} in one call, more than {self._config.max_digests}")
