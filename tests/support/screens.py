"""What screens show in tests: reports about 1 to 300 variants and 1 to 40 workers, names of all lengths."""

from __future__ import annotations

from dataclasses import replace

from blockserve.common.api.call_trace import CallTrace, ChoiceTrace
from blockserve.common.api.cluster import Run as Positions
from blockserve.common.api.cluster import WorkerId
from blockserve.common.api.engine import SegmentReport
from blockserve.common.api.placement import WishStatus
from blockserve.common.api.spans import PathTrace, PhaseTimes, SpanTimes, StepTrace
from blockserve.common.api.status import (
    ClusterStatus,
    LoadedChain,
    ResidentRun,
    RunningPath,
    RunningStep,
    ServerStatus,
    WorkerStatus,
)
from blockzoo.care.backup import CopyReport
from blockzoo.care.verify import Problem, VerifyReport
from blockzoo.equivalence.overview import EquivalenceReport
from blockzoo.equivalence.records import Action, Decision, EquivalenceRecord, RecordId, Side
from blockzoo.equivalence.records import Positions as Span
from blockzoo.manifest import BlobId, ChainId, VariantName, VariantRecord
from blockzoo.registering.folder import RegisterResult
from blockzoo.reports.values import (
    Applied,
    DiffReport,
    LinkDiff,
    Run,
    ShowReport,
    TensorDiff,
    UsageReport,
    UsageRow,
    VariantRow,
)

LAYERS = 30
DIGEST = "3fd1cc78675e76ea249c9a16c81752ed6bf2dc5d24297230292b752d320ab841"


LONG_NAME = "unregistered.3fd1cc78675e76ea249c9a16c81752ed"
"""As the server gives them."""
LONG_WORKER = "worker-3.rack-12.eu-central-1.compute.internal"


def name(number: int) -> str:
    """Names of all lengths that people give, and one of the server's own."""
    if number == 6:
        return LONG_NAME
    return ("base", "kjv", "support-bot", "invoice-assistant-german-v2")[number % 4] + (
        f"-{number}" if number >= 4 else ""
    )


def variant_rows(count: int) -> list[VariantRow]:
    return [
        VariantRow(
            name(n),
            1 + n % 3,
            "adapter" if n else "checkpoint",
            f"{name(0)}@1" if n else None,
            "llama",
            LAYERS,
            269_060_552,
            0 if n == 0 else 9_770_000 + 1000 * n,
            f"2026-11-{1 + n % 28:02d}T09:30:00+00:00",
            DIGEST,
            0 if n == 0 else 9_800_000 + 1000 * n,
        )
        for n in range(count)
    ]


def usage(count: int) -> UsageReport:
    rows = [
        UsageRow(
            row.name,
            row.version,
            269_060_552 * row.version,
            row.private_bytes,
            row.private_stored_bytes,
            9_900_000,
        )
        for row in variant_rows(count)
    ]
    return UsageReport(tuple(rows), 269_060_552 * count, 300_000_000, 290_000_000, 4_000_000, 17_300_000)


def shown(count: int) -> ShowReport:
    others = tuple(name(n) for n in range(1, count))
    lora = (Applied("adapter", ("mlp.down_proj", "mlp.gate_proj", "self_attn.q_proj"), (16,), 9_770_000),)
    runs = (
        Run(0, 0, "embedding", 56_600_000, others, ()),
        Run(1, 22, "layer", 155_000_000, others, lora),
        Run(23, 30, "layer", 56_600_000, (), lora),
        Run(31, 31, "head", 56_600_000, others, ()),
    )
    provenance = {
        "base": "base@1",
        "num_bytes": "9770000",
        "registered_at": "2026-11-28T09:30:00+00:00",
        "registered_by": "blockzoo 0.1.0",
        "source": "/home/someone/experiments/2026-11/adapters/support-bot/checkpoint-1200",
    }
    return ShowReport(
        "support-bot", 3, True, (1, 2, 3), "adapter", DIGEST, "llama", 8192, 49152, runs, 269_060_552,
        9_770_000, 278_000_000, {"tokenizer.json": 2_100_000, "adapter_config.json": 900}, provenance,
    )  # fmt: skip


def difference() -> DiffReport:
    changed = tuple(
        TensorDiff(part, 100, 100, 100) for part in ("self_attn.q_proj.weight", "mlp.up_proj.weight")
    )
    links = (
        LinkDiff(0, "embedding", "equal", (), 0, 0),
        *(LinkDiff(n, "layer", "different", changed, 0, 0) for n in range(1, 9)),
        LinkDiff(9, "layer", "adapters", (), 0, 500),
    )
    return DiffReport(
        "base@1", "support-bot@3", links, ("tokenizer.json", "chat_template.jinja"), 23, 1, 8, 1600
    )


def verified(count: int) -> VerifyReport:
    """One damaged object that hurts all variants, and a lost one for each; the first of these is repaired."""
    refs = tuple(f"{name(n)}@1" for n in range(count))
    problems = [Problem(f"blobs/3f/{DIGEST}", False, "bytes are not those that the name says", refs)]
    problems += [
        Problem(f"chains/{number:02d}{DIGEST[2:]}.json", True, "missing", (ref,), number == 0)
        for number, ref in enumerate(refs)
    ]
    return VerifyReport(12_000, 4_200_000_000, tuple(problems), ("notes.txt",))


def status(count: int) -> ServerStatus:
    chains = tuple(
        LoadedChain(
            DIGEST[n % 40 :] + "0" * (n % 40),
            (f"{name(n)}@{1 + n % 3}",),
            int(n % 7 == 3),
            9_770_000,
            278_000_000,
            n == 1,
        )
        for n in range(count)
    )
    trunk = SegmentReport("aa" * 16, 0, 23, count, 65, 455, 300, 64, 12, min(count, 5))
    own = tuple(
        SegmentReport(f"{n:032x}", 23, 9, 1 if n else max(1, count - 1), 64, 99, 64, 0, 8, 1)
        for n in range(1 if count == 1 else max(2, count // 3))
    )
    return ServerStatus(
        "0.1.0", 185.0, "/srv/models/zoo", "cpu", 3, 2, 2934, 4096, 40, 8_000_000_000, 1_200_000_000, chains,
        (trunk, *own), 3, 7000, 3500, 1, 4,
    )  # fmt: skip


def worker(number: int) -> str:
    """Names of workers, one of them long."""
    return LONG_WORKER if number == 2 else f"worker-{number + 1}"


def cluster(workers: int, variants: int = 12) -> ServerStatus:
    """Each worker holds the trunk or the top; the adapters of the variants lie on all of them."""
    half = 16
    statuses = []
    for n in range(workers):
        first, length = (0, half) if n % 2 == 0 else (half, LAYERS + 2 - half)
        if workers == 1:
            first, length = 0, LAYERS + 2
        runs = tuple(ResidentRun(f"{v:032x}", first, length) for v in range(variants))
        load = (1, 2, 50) if n % 5 == 0 else (0, 0, 0)
        state = "draining" if n == 7 else "ready"
        statuses.append(
            WorkerStatus(
                f"worker-{n}.17{n}", worker(n), f"unix:/home/someone/.local/worker-{n + 1}.sock",
                "host-1", state, *load, 0.0123 * (n % 5 == 0), 0 if n == 2 else 900, 0 if n == 2 else 1000,
                500_000_000, 2_000_000_000, runs,
            )
        )  # fmt: skip
    step = [RunningStep(one.worker_id, one.name, run.first_position, run.num_blocks)
            for one in statuses[:2] for run in one.segments[:1]]  # fmt: skip
    paths = tuple(RunningPath(tuple(step), 5 - n) for n in range(min(3, workers)))
    part = ClusterStatus(tuple(statuses), 1795840286409, 3, paths)
    return replace(status(0), zoo_url="s3://models/zoo", chains=(), segments=(), cluster=part)


def call(workers: int) -> CallTrace:
    phase = PhaseTimes(10, 10, 2.0, 0.5, 0.25, 6.0, 10)
    times = SpanTimes(0.5, 0.25, 1, 6, PhaseTimes(1, 128, 1.0, 1.0, 0.0, 2.0, 1), phase)
    size = max(LAYERS + 2, 2 * workers) // workers
    steps = tuple(
        StepTrace(WorkerId(f"w{n}.1"), worker(n), Positions(n * size, (n + 1) * size), times, 0.002)
        for n in range(workers)
    )
    path = PathTrace(0, steps, 0.125, 0.0625, "recompute: owner_lost", 12.5, "")
    choice = ChoiceTrace(0, "r#0", 0.75, 4.0, 15.0, 11, (path,))
    return CallTrace("invoice-1", "support-bot", 3, 128, "finished", 0.01, 0.02, 15.0, 30.0, (choice,))


def wishes(count: int) -> list[WishStatus]:
    """Every third is on workers of its own, every fifth is gone."""
    return [
        WishStatus(
            name(n),
            pinned=n % 2 == 0,
            replicas=n % 4,
            workers=tuple(map(worker, range(1 + n % 3))) if n % 3 == 0 else (),
            avoid=(worker(3),) if n % 4 == 1 else (),
            since="2026-11-28T09:30:00+00:00",
            chain="" if n % 5 == 4 else DIGEST,
            placed=() if n % 5 == 4 else tuple(map(worker, range(n % 9))),
        )
        for n in range(count)
    ]


def records(count: int) -> list[EquivalenceReport]:
    """What was measured, and what was decided about every third of it."""
    return [_record(n) for n in range(count)]


def _record(number: int) -> EquivalenceReport:
    ident = RecordId(f"{number:03d}{DIGEST[3:]}")
    a = Side(f"{name(number)}@{1 + number % 3}", ChainId(DIGEST), Span(23, 31), ())
    b = Side("base@1", ChainId(DIGEST[::-1]), Span(23, 31), ())
    distance = None if number % 5 == 0 else 0.0123
    record = EquivalenceRecord(
        a, b, ChainId(DIGEST), 0.00123 * number, 1.5 + number, 0.97, distance, 4096, 512, DIGEST, 20_480,
        BlobId(DIGEST), "float32", "2026-11-28T09:30:00+00:00", "0.1.0", ident,
    )  # fmt: skip
    at = "2026-11-28T10:00:00+00:00"
    decisions = (
        Decision(ident, 1, Action.APPROVE, (a.variant,), "ann", "may answer under overload", at, 0.02, 0.95),
        Decision(ident, 2, Action.REVOKE, (), "someone.with.a.long.name@example.com", "complaints", at),
        Decision(ident, 3, Action.APPROVE, (a.variant,), "ann", "incident", at, 0.5, None, True),
    )
    kept = decisions if number % 3 == 0 else ()
    return EquivalenceReport(record, "approved" if kept else "evaluated", number % 2 == 0, kept)


def copied(count: int) -> CopyReport:
    """Every fourth was skipped, every fifth came back under another number."""
    skipped = {f"{name(n)}@2": "removed at the destination" for n in range(3, count, 4)}
    skipped |= {f"{name(n)}@3": "conflict: the destination holds something else under this number"
                for n in range(5, count, 40)}  # fmt: skip
    added = tuple(f"{name(n)}@4" for n in range(count))
    return CopyReport(
        1200, 290_000_000, 17, added, skipped, {f"{name(n)}@1": added[n] for n in range(0, count, 5)}
    )


def registration(number: int) -> RegisterResult:
    """What becomes of a folder: new, known, or with remarks."""
    provenance = {"notes": "trained on tickets of 2025 and 2026, see the experiment log",
                  "set_aside": "lora_dropout, inference_mode, task_type"}  # fmt: skip
    record = VariantRecord(
        VariantName(name(number)), 1 + number % 3, ChainId(DIGEST), "adapter", {}, provenance
    )
    ignored = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq")
    remarks = ("The context is 8192 tokens: config.json says 131072, and rope_scaling is missing.",)
    named, real = (f"HuggingFaceTB/SmolLM2-{size}-Instruct" for size in ("360M", "135M"))
    doubt = f"adapter_config.json names {named} as its base, and base was registered from {real}"
    doubt = doubt if number % 4 == 0 else ""
    return RegisterResult(
        record, number % 4 == 1, 9_770_000, 900_000, 800_000, 120, 12, ignored * 2, 1.25, remarks, doubt,
        2 if number % 8 == 1 else 0,
    )  # fmt: skip


def rolled_back(count: int) -> list[VariantRecord]:
    """Versions of one variant."""
    return [
        replace(
            registration(0).record,
            version=1 + n,
            provenance={"rollback_of": f"base@{n}"} if n % 2 or n == count - 1 else {},
        )
        for n in range(count)
    ]
