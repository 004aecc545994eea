"""A server's zoo, with the methods of `blockzoo.Zoo` that make sense from far away.

::

    with RemoteZoo("127.0.0.1:7450") as zoo:
        zoo.register("my-lora", name="support-bot", base="base")
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self, TypeVar

from blockproto.v1 import zoo_pb2
from blockserve.client.remote_store import PATIENCE_S, RemoteStore
from blockserve.client.zoo_calls import OPERATION_SECONDS, Calls
from blockserve.common.errors import RemoteError
from blockserve.common.rpc.address import DEFAULT_TARGET
from blockserve.common.rpc.channel import Credentials
from blockserve.common.wire import equivalence as equivalence_wire
from blockserve.common.wire import zoo as wire
from blockzoo.care.gc import GRACE_S, GcReport
from blockzoo.care.verify import VerifyReport
from blockzoo.equivalence import Decision, EquivalenceRecord
from blockzoo.equivalence.overview import EquivalenceOverview, EquivalenceReport
from blockzoo.folders.export import ExportResult, export_variant
from blockzoo.manifest import VariantRecord
from blockzoo.names import is_based_on, parse_ref
from blockzoo.progress import NoProgress, Progress
from blockzoo.registering.folder import RegisterResult, register_folder
from blockzoo.reports.compare import compare
from blockzoo.reports.values import DiffReport, RemoveReport, ShowReport, UsageReport, VariantRow

R = TypeVar("R")


class RemoteZoo:
    """A zoo behind a server. Blocking; used by one thread at a time."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: Credentials | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Prepare a connection; nothing is sent yet.

        Args:
            target: `host:port`, or `unix:/path`.
            credentials: TLS and token; None for a plain connection.
            patience_s: seconds that `register` and `export` go on trying while a connection is broken.

        Raises:
            ConfigurationError: a token would travel readable, or a file of the credentials cannot be read.
        """
        self._calls = Calls(target, credentials or Credentials())
        self._store = RemoteStore(self._calls, patience_s=patience_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._calls.close()

    @property
    def url(self) -> str:
        """Where the zoo is, as its server says."""
        return self._store.description.zoo_url

    def resolve(self, ref: str) -> VariantRecord:
        """As `Zoo.resolve`."""
        return self._store.resolve(*parse_ref(ref))

    def ls(self) -> list[VariantRow]:
        """As `Zoo.ls`."""
        return self._store.rows()

    def show(self, ref: str) -> ShowReport:
        """As `Zoo.show`."""
        answer = self._calls.call("ShowVariant", zoo_pb2.ShowVariantRequest(ref=ref))
        return wire.from_message(answer.report, ShowReport)

    def du(self) -> UsageReport:
        """As `Zoo.du`."""
        answer = self._calls.call("GetUsage", zoo_pb2.GetUsageRequest())
        return wire.from_message(answer.report, UsageReport)

    def diff(self, a: str, b: str) -> DiffReport:
        """As `Zoo.diff`; compared here, from the manifests."""
        return compare(self._store, self.resolve(a), self.resolve(b))

    def register(
        self,
        path: str | Path,
        *,
        name: str,
        base: str | None = None,
        revision: str | None = None,
        progress: Progress | None = None,
    ) -> RegisterResult:
        """As `Zoo.register`; only tensors that the server's zoo lacks are sent.

        Raises:
            PushInterruptedError: the connection broke, and did not come back in time.
            BlockzooError: as `blockzoo.registering.folder.register_folder`.
        """
        return register_folder(self._store, path, name=name, base=base, revision=revision, progress=progress)

    def export(self, ref: str, dest: str | Path, *, progress: Progress | None = None) -> ExportResult:
        """As `Zoo.export`; the server sends the blobs, and each is verified here before it is written.

        Raises:
            ExportInterruptedError: the connection broke, and did not come back in time.
            BlockzooError: as `blockzoo.folders.export.export_variant`.
        """
        record = self.resolve(ref)
        return export_variant(self._store.source(record), record, Path(dest), progress=progress)

    def batch(self) -> AbstractContextManager[None]:
        """As `Zoo.batch`; a server takes each push by itself."""
        return nullcontext()

    def rm(self, ref: str) -> RemoveReport:
        """As `Zoo.rm`."""
        answer = self._calls.call("RemoveVariant", zoo_pb2.RemoveVariantRequest(ref=ref))
        return wire.from_message(answer.report, RemoveReport)

    def rollback(self, name: str, to: int | None = None) -> VariantRecord:
        """As `Zoo.rollback`."""
        request = zoo_pb2.RollbackVariantRequest(name=name, to=to)
        return wire.record_from_message(self._calls.call("RollbackVariant", request).record)

    def equivalences(self) -> EquivalenceOverview:
        """As `Zoo.equivalences`."""
        reports: list[EquivalenceReport] = []
        unreadable: dict[str, str] = {}
        for part in self._calls.stream("ListEquivalence", zoo_pb2.ListEquivalenceRequest()):
            reports += map(equivalence_wire.report_from_message, part.reports)
            unreadable.update(part.unreadable)
        return EquivalenceOverview(tuple(reports), dict(sorted(unreadable.items())))

    def equivalence(self, record: str) -> EquivalenceReport:
        """As `Zoo.equivalence`."""
        answer = self._calls.call("ShowEquivalence", zoo_pb2.ShowEquivalenceRequest(record=record))
        return equivalence_wire.report_from_message(answer.report)

    def approve_equivalence(
        self,
        record: str,
        *,
        by: str,
        reason: str,
        max_kl: float,
        min_agreement: float | None = None,
        variants: Sequence[str] = (),
        force: bool = False,
    ) -> tuple[Decision, EquivalenceRecord]:
        """As `Zoo.approve_equivalence`."""
        request = zoo_pb2.ApproveEquivalenceRequest(
            record=record,
            by=by,
            reason=reason,
            max_kl=max_kl,
            min_agreement=min_agreement,
            variants=variants,
            force=force,
        )
        answer = self._calls.call("ApproveEquivalence", request)
        decision = equivalence_wire.decision_from_bytes(answer.decision)
        return decision, equivalence_wire.record_from_bytes(answer.record, decision.record)

    def revoke_equivalence(self, record: str, *, by: str, reason: str) -> Decision:
        """As `Zoo.revoke_equivalence`."""
        request = zoo_pb2.RevokeEquivalenceRequest(record=record, by=by, reason=reason)
        answer = self._calls.call("RevokeEquivalence", request)
        return equivalence_wire.decision_from_bytes(answer.decision)

    def dependants(self, name: str) -> list[str]:
        """As `Zoo.dependants`."""
        return [row.name for row in self.ls() if is_based_on(row.base, name)]

    def gc(
        self, *, grace_s: float = GRACE_S, dry_run: bool = False, progress: Progress | None = None
    ) -> GcReport:
        """As `Zoo.gc`."""
        request = zoo_pb2.CollectGarbageRequest(grace_seconds=grace_s, dry_run=dry_run)
        return self._operate("CollectGarbage", request, GcReport, progress)

    def verify(self, *, progress: Progress | None = None) -> VerifyReport:
        """As `Zoo.verify`, without repair."""
        return self._operate("VerifyZoo", zoo_pb2.VerifyZooRequest(), VerifyReport, progress)

    def _operate(self, method: str, request: Any, kind: type[R], progress: Progress | None) -> R:
        """Run a long operation at the server and pass its progress on."""
        shown = progress or NoProgress()
        task, done = "", 0
        try:
            for message in self._calls.stream(method, request, timeout=OPERATION_SECONDS):
                if message.HasField("report"):
                    return wire.from_message(message.report, kind)
                step = wire.step_from_message(message.progress)
                if step.task != task:
                    task, done = step.task, 0
                    shown.start(task, step.total_bytes)
                shown.advance(step.done_bytes - done)
                done = step.done_bytes
        finally:
            if task:
                shown.finish()
        raise RemoteError("the server ended without a report")
