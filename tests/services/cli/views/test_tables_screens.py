"""Every screen at 60, 80 and 120 columns, with 1, 12 and 300 variants and 1 to 40 workers.

The files in screens/ hold what is shown, to be read by people; WRITE_SCREENS=1 writes them again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from blockserve.cli.views.server import draw_status, headline
from blockserve.cli.views.tables import Column, Table, cells_of, fold
from blockserve.cli.views.trace import draw_call
from blockserve.cli.views.zoo import draw_diff, draw_usage, draw_variant, problems_table, variants_table
from blockserve.common.api.call_trace import CallTrace, ChoiceTrace
from blockserve.common.api.cluster import Run as Positions
from blockserve.common.api.cluster import WorkerId
from blockserve.common.api.engine import SegmentReport
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
from blockzoo.care.verify import Problem
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

SCREENS = Path(__file__).with_name("screens")
WIDTHS = (60, 80, 120)
COUNTS = (1, 12, 300)
HEIGHT = 24
LAYERS = 30
DIGEST = "3fd1cc78675e76ea249c9a16c81752ed6bf2dc5d24297230292b752d320ab841"


def name(number: int) -> str:
    """Names of all lengths that people give."""
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


def difference(count: int) -> DiffReport:
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


def problems(count: int) -> Table:
    hurt = tuple(f"{name(n)}@1" for n in range(count))
    return problems_table(
        [
            Problem(f"blobs/3f/{DIGEST}", False, "bytes are not those that the name says", hurt),
            Problem(f"chains/{DIGEST}.json", True, "missing", hurt[:1], True),
        ]
    )


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
                f"worker-{n}.17{n}", f"worker-{n + 1}", f"unix:/home/someone/.local/worker-{n + 1}.sock",
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
    size = (LAYERS + 2) // workers
    steps = tuple(
        StepTrace(WorkerId(f"w{n}.1"), f"worker-{n + 1}", Positions(n * size, (n + 1) * size), times, 0.002)
        for n in range(workers)
    )
    path = PathTrace(0, steps, 0.125, 0.0625, "recompute: owner_lost", 12.5, "")
    choice = ChoiceTrace(0, "r#0", 0.75, 4.0, 15.0, 11, (path,))
    return CallTrace("invoice-1", "support-bot", 3, 128, "finished", 0.01, 0.02, 15.0, 30.0, (choice,))


Screen = Callable[[int | None], list[str]]

OF_VARIANTS: dict[str, Callable[[int, int | None], list[str]]] = {
    "ls": lambda count, width: variants_table(variant_rows(count)).lines(width),
    "du": lambda count, width: draw_usage(usage(count), width),
    "show": lambda count, width: draw_variant(shown(count), width),
    "diff": lambda count, width: draw_diff(difference(count), width),
    "verify": lambda count, width: problems(count).lines(width),
    "status": lambda count, width: draw_status(status(count), width),
    "watch": lambda count, width: draw_status(status(count), width, HEIGHT),
}
OF_WORKERS: dict[str, Callable[[int, int | None], list[str]]] = {
    "cluster": lambda workers, width: draw_status(cluster(workers), width),
    "cluster-watch": lambda workers, width: draw_status(cluster(workers), width, HEIGHT),
    "cluster-of-300": lambda workers, width: draw_status(cluster(workers, 300), width),
    "trace": lambda workers, width: draw_call(call(min(workers, 8)), width),
}
CASES = [(screen, count) for screen in OF_VARIANTS for count in COUNTS]
CASES += [(screen, count) for screen in OF_WORKERS for count in (1, 2, 4, 12, 40)]
KEPT = [("ls", 12), ("du", 12), ("show", 12), ("diff", 1), ("verify", 12), ("status", 12), ("status", 300)]
KEPT += [("watch", 300), ("cluster", 4), ("cluster-watch", 40), ("trace", 2)]


def draw(screen: str, count: int, width: int | None) -> list[str]:
    return (OF_VARIANTS | OF_WORKERS)[screen](count, width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("screen", "count"), CASES)
def test_lines_fit_and_words_are_whole(screen: str, count: int, width: int) -> None:
    words = {word.rstrip(";") for line in draw(screen, count, None) for word in line.split()}
    lines = draw(screen, count, width)
    for line in lines:
        assert cells_of(line) <= width or len(line.split()) == 1, line
        assert line == line.rstrip()
    if "watch" not in screen:  # which folds more, and sums up other things
        heads = {"applied", "shared", "with"}  # of columns, where a row has become a paragraph
        assert {word.rstrip(";") for line in lines for word in line.split()} - heads <= words


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("screen", "count"), CASES)
def test_a_watched_screen_fits_its_terminal(screen: str, count: int, width: int) -> None:
    if "watch" in screen:
        assert len(draw(screen, count, width)) <= HEIGHT


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("screen", "count"), KEPT)
def test_screens_are_those_that_were_looked_at(screen: str, count: int, width: int) -> None:
    file = SCREENS / f"{screen}-{count}-{width}.txt"
    text = "\n".join(draw(screen, count, width)) + "\n"
    if os.environ.get("WRITE_SCREENS"):
        SCREENS.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("screen", ["ls", "du"])
def test_in_a_pipe_a_row_is_a_line(screen: str) -> None:
    lines = draw(screen, 300, None)
    assert all(any(line.startswith(f"{name(n)} ") for line in lines) for n in range(300))
    assert max(map(len, lines)) < 130


@pytest.mark.parametrize(("screen", "count"), CASES)
def test_piped_lines_are_not_endless(screen: str, count: int) -> None:
    assert max(map(len, draw(screen, count, None))) <= 200


def test_idle_variants_are_one_line_and_busy_ones_come_first() -> None:
    lines = draw("status", 300, 120)
    table = lines[lines.index("") :]
    first = next(number for number, line in enumerate(lines) if line.startswith("VARIANTS"))
    assert next(number for number, line in enumerate(lines) if line.startswith("SEGMENT")) < first
    assert all(line.split()[1] == "1" for line in lines[first + 1 : first + 1 + 43])
    assert any(line.startswith("257 more idle (1 pinned), ") for line in table)
    everything = draw_status(status(300), 120, everything=True)
    assert not any("idle" in line for line in everything)


def test_without_pages_none_are_counted() -> None:
    report = replace(status(1), kv_pages_total=0, kv_pages_used=0, kv_bytes_total=0)
    assert "0 of 0" not in "\n".join([*draw_status(report, 80), headline(report)])
    assert "1795840286409" not in "\n".join(draw("cluster", 4, 120))


def test_fold_never_breaks_a_word() -> None:
    assert fold("one two three", 7) == ["one two", "three"]
    assert fold("averylongword two", 5) == ["averylongword", "two"]
    assert fold("", 5) == [""]
    assert fold("  it takes 25.4 kB and 3 min", 14) == ["  it takes", "  25.4 kB and", "  3 min"]
    assert fold("日本 語", 4) == ["日本", "語"]


def test_a_table_without_room_becomes_paragraphs() -> None:
    table = Table((Column("NAME"), Column("SIZE", numeric=True)))
    table.add("a-name-that-is-long", "5 MB")
    assert table.lines(15) == ["a-name-that-is-long", "  size 5 MB"]
