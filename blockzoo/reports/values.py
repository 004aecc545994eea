"""What a zoo says about its contents. Values only; `blockzoo.reports.survey` computes them.

Bytes are decoded bytes of tensors and files unless a name says "stored".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blockzoo.json_report import JsonReport


@dataclass(frozen=True, slots=True)
class VariantRow(JsonReport):
    """One line of `ls`.

    Attributes:
        name: variant.
        version: current version.
        kind: "checkpoint" or "adapter"; "damaged" when its ref or manifests cannot be read.
        base: NAME@VERSION of the base it was registered with, or None.
        family: model family, "" when the chain cannot be read.
        num_layers: decoder layers.
        checkpoint_bytes: what it would take as a checkpoint of its own.
        private_bytes: what only this variant needs, all versions.
        registered_at: ISO 8601, UTC.
        chain: digest.
        private_stored_bytes: the private bytes as stored: less where differences are stored.
    """

    name: str
    version: int
    kind: str
    base: str | None
    family: str
    num_layers: int
    checkpoint_bytes: int
    private_bytes: int
    registered_at: str
    chain: str
    private_stored_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Applied(JsonReport):
    """A block applied on the links of a run, summed up.

    Attributes:
        kind: "adapter" or another kind.
        modules: modules that it changes.
        ranks: their ranks, ascending.
        num_bytes: bytes on all links of the run together.
        methods: what it does beside plain LoRA.
    """

    kind: str
    modules: tuple[str, ...]
    ranks: tuple[int, ...]
    num_bytes: int
    methods: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Run(JsonReport):
    """Consecutive links of a chain that look alike.

    Attributes:
        first: position of the first link; 0 is the embedding.
        last: position of the last link.
        kind: of the base blocks.
        num_bytes: of the base blocks together.
        shared_with: other variants that use all of these base blocks.
        applied: what is applied on the links.
    """

    first: int
    last: int
    kind: str
    num_bytes: int
    shared_with: tuple[str, ...]
    applied: tuple[Applied, ...]

    @property
    def label(self) -> str:
        """The run in words: "embedding", "layers 0-21", "head"."""
        if self.kind != "layer":
            return self.kind
        first, last = self.first - 1, self.last - 1
        return f"layer {first}" if first == last else f"layers {first}-{last}"


@dataclass(frozen=True, slots=True)
class ShowReport(JsonReport):
    """One version of a variant.

    Attributes:
        name: variant.
        version: which version.
        current: whether it is the current one.
        versions: all versions there are.
        kind: "checkpoint" or "adapter".
        chain: digest.
        family: model family.
        context_length: tokens of prompt and answer together.
        vocab_size: rows of the head.
        runs: the chain.
        checkpoint_bytes: what it would take as a checkpoint of its own.
        private_bytes: what only this variant needs, all versions.
        stored_bytes: bytes of its objects as stored, shared ones included.
        files: file name -> bytes.
        provenance: where it comes from.
        missing: keys of objects that it needs and that are not stored. Bytes are not checked.
    """

    name: str
    version: int
    current: bool
    versions: tuple[int, ...]
    kind: str
    chain: str
    family: str
    context_length: int
    vocab_size: int
    runs: tuple[Run, ...]
    checkpoint_bytes: int
    private_bytes: int
    stored_bytes: int
    files: Mapping[str, int]
    provenance: Mapping[str, str]
    missing: tuple[str, ...] = ()

    def draw(self) -> str:
        """Return the chain as one line; private runs are in brackets, adapters behind a plus sign."""
        parts = []
        for run in self.runs:
            text = run.label + "".join(f" + {item.kind}" for item in run.applied)
            parts.append(text if run.shared_with else f"[{text}]")
        return " -> ".join(parts)


@dataclass(frozen=True, slots=True)
class UsageRow(JsonReport):
    """One variant in `du`, all its versions together.

    Attributes:
        name: variant.
        versions: how many.
        checkpoint_bytes: what they would take as checkpoints of their own.
        private_bytes: what no other variant needs.
        private_stored_bytes: the same as stored.
        freed_bytes: what `rm` and `gc` would free: stored objects that only this variant needs, and no other
            one as the base of a difference; manifests too.
    """

    name: str
    versions: int
    checkpoint_bytes: int
    private_bytes: int
    private_stored_bytes: int
    freed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class UsageReport(JsonReport):
    """Result of `du`.

    Attributes:
        rows: by name.
        checkpoint_bytes: what all versions would take as checkpoints of their own.
        distinct_bytes: each different tensor and file once.
        stored_bytes: the same as stored, bases of differences included.
        manifest_bytes: blocks, chains and refs.
        unreachable_bytes: stored blobs that no variant needs; `gc` frees them.
        damaged: NAME@N of versions whose ref or manifests cannot be read, or of which objects are missing.
            Bytes of tensors are not checked.
        format: of the zoo; 0 where a server does not say.
    """

    rows: tuple[UsageRow, ...]
    checkpoint_bytes: int
    distinct_bytes: int
    stored_bytes: int
    manifest_bytes: int
    unreachable_bytes: int
    damaged: tuple[str, ...] = ()
    format: int = 0

    @property
    def sharing_factor(self) -> float:
        """How many times the stored bytes the checkpoints would take; 1.0 for an empty zoo."""
        return self.checkpoint_bytes / self.stored_bytes if self.stored_bytes else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the report with the sharing factor."""
        # Named class: slots=True makes a new class, which zero-argument super() does not know.
        return {**JsonReport.to_json(self), "sharing_factor": round(self.sharing_factor, 4)}


@dataclass(frozen=True, slots=True)
class TensorDiff(JsonReport):
    """A tensor that differs.

    Attributes:
        name: inside the block.
        bytes_a: its bytes in A, 0 when A lacks it.
        bytes_b: its bytes in B, 0 when B lacks it.
        changed_bytes: bytes of B's blobs that A's tensor does not have.
    """

    name: str
    bytes_a: int
    bytes_b: int
    changed_bytes: int


@dataclass(frozen=True, slots=True)
class LinkDiff(JsonReport):
    """One link of two chains.

    Attributes:
        position: 0 is the embedding; the heads are compared whatever their positions.
        kind: of the base block.
        status: "equal", "adapters" (same base block, something else applied), "different",
            "only in A" or "only in B".
        tensors: what differs in the base blocks.
        applied_bytes_a: bytes applied on the link in A.
        applied_bytes_b: bytes applied on the link in B.
    """

    position: int
    kind: str
    status: str
    tensors: tuple[TensorDiff, ...]
    applied_bytes_a: int
    applied_bytes_b: int


@dataclass(frozen=True, slots=True)
class DiffReport(JsonReport):
    """Result of `diff A B`.

    Attributes:
        a: NAME@VERSION.
        b: NAME@VERSION.
        links: every link, in order.
        files: files that differ, or that only one of them has.
        equal: links that are the same.
        adapters: links where only what is applied differs.
        different: links with other base blocks, or in one chain only.
        changed_bytes: bytes of base blocks in B that A does not have.
    """

    a: str
    b: str
    links: tuple[LinkDiff, ...]
    files: tuple[str, ...]
    equal: int
    adapters: int
    different: int
    changed_bytes: int


@dataclass(frozen=True, slots=True)
class RemoveReport(JsonReport):
    """Result of `rm`.

    Attributes:
        name: variant.
        removed: version numbers that are gone.
        remaining: version numbers that are left.
    """

    name: str
    removed: tuple[int, ...]
    remaining: tuple[int, ...]
