"""What the demo serves: the base, three committed adapters, one checkpoint tuned on the spot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from blockserve.cli.views.progress import progress
from blockserve.cli.views.tables import format_bytes
from blockzoo.errors import AdapterError
from blockzoo.zoo import Zoo

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"


@dataclass(frozen=True, slots=True)
class Variant:
    """A variant of the demo.

    Attributes:
        name: in the zoo.
        folder: checkpoint or adapter.
        base: name of the variant it was tuned from, None for the base itself.
        about: one line for people.
    """

    name: str
    folder: Path
    base: str | None
    about: str

    @property
    def heldout(self) -> Path | None:
        """Text of the variant's domain that no training has seen; None for the base."""
        return DEMO / "heldout" / f"{self.name}.txt" if self.base else None


def base_name(model: Path) -> str:
    """The base variant's name: the folder's, as far as a variant may be called so."""
    return re.sub(r"[^a-z0-9]+", "-", model.resolve().name.lower()).strip("-") or "base"


def demo_variants(model: Path) -> list[Variant]:
    """The variants, base first."""
    adapters, base = DEMO / "adapters", base_name(model)
    return [
        Variant(base, model, None, "the base model"),
        Variant("kjv", adapters / "kjv", base, "LoRA r4 on q and v: King James Bible"),
        Variant("bierce", adapters / "bierce", base, "LoRA r4 on v and o: The Devil's Dictionary"),
        Variant("spanish", adapters / "spanish", base, "LoRA r2 on q, v, o, down: Spanish of 1909"),
        Variant("hacker", tuned_folder(model), base, "top quarter of the layers tuned: Jargon File"),
    ]


def tuned_folder(model: Path) -> Path:
    """Where the tuned checkpoint of a base is kept; it is trained once."""
    return ROOT / ".cache" / f"hacker-{model.resolve().name}"


def train_missing(model: Path) -> None:
    """Tune the top quarter of the layers if that has not been done; shows a progress bar.

    Raises:
        subprocess.CalledProcessError: training failed; it has said why.
    """
    out = tuned_folder(model)
    if (out / "training.json").exists():
        return
    script = ROOT / "scripts" / "train_top_quarter.py"
    # A process of its own: its memory is free again before the server starts.
    command = [sys.executable, str(script), "--model", str(model), "--out", str(out)]
    subprocess.run(command, check=True, env=shared_machine())


def shared_machine() -> dict[str, str]:
    """The environment for child processes that compute.

    Threads of libgomp spin while they wait for each other. Beside other busy processes that made decoding
    25 times slower than letting them sleep soon; on an idle machine sleeping soon costs about 15 %.
    """
    return {"GOMP_SPINCOUNT": "1000", **os.environ}


def register_all(zoo: Zoo, variants: list[Variant], console: Console) -> list[Variant]:
    """Register the variants that are new or have changed; return those that fit the base."""
    served = []
    for variant in variants:
        try:
            with progress() as reporter:
                result = zoo.register(variant.folder, name=variant.name, base=variant.base, progress=reporter)
        except AdapterError as error:
            # Another MODEL than the adapters were trained on.
            console.print(f"  {variant.name:8} left out: {error}", markup=False)
            continue
        served.append(variant)
        what = "already there" if result.unchanged else f"{format_bytes(result.stored_bytes)} stored"
        line = (
            f"  {variant.name:8} {format_bytes(result.num_bytes):>7} in the folder, {what:16} {variant.about}"
        )
        console.print(line, markup=False, soft_wrap=True)
    return served
