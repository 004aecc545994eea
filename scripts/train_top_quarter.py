"""Tune the top quarter of a checkpoint's layers and save it as a full checkpoint of the same type.

`make demo` runs this once: a minute or two on two cores. The lower layers run without a graph,
so a step costs about a third of a full one. Embedding, final norm and head stay as they are.
The text is `demo/train/hacker.json.gz`, an excerpt of the Jargon File (public domain).

    python scripts/train_top_quarter.py --model .cache/smollm2 --out .cache/hacker
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

import train_texts
import training
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, PreTrainedModel

DEMO = Path(__file__).resolve().parent.parent / "demo"
TRAIN = training.TrainConfig(steps=40, learning_rate=6e-4, batch_rows=4, row_tokens=192)

_MIN_CHARS = 300  # entries that only point at another one teach no voice


def main() -> None:
    """Train and save; does nothing where the result is already there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="base checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="where the tuned checkpoint is written")
    parser.add_argument("--steps", type=int, default=TRAIN.steps)
    parser.add_argument("--learning-rate", type=float, default=TRAIN.learning_rate)
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other variants")
    parser.add_argument(
        "--refresh-texts",
        type=Path,
        help="cut demo/train and demo/heldout again from the package in this folder",
    )
    args = parser.parse_args()
    if args.refresh_texts:
        write_texts(args.refresh_texts)
    if (args.out / "training.json").exists():
        print(f"{args.out}: already there")
        return
    config = training.TrainConfig(
        args.steps, args.learning_rate, TRAIN.batch_rows, TRAIN.row_tokens, args.seed
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("tuning the top quarter of the layers", total=config.steps, loss="")
        report = tune(
            args.model,
            args.out,
            config,
            lambda step, loss: bar.update(task, completed=step, loss=f"loss {loss:.2f}"),
        )
    print(json.dumps(report))


def tune(
    base: Path, out: Path, config: training.TrainConfig, on_step: Callable[[int, float], None]
) -> dict[str, float]:
    """Train, save to `out` (complete or not at all), and return held-out losses and the time taken."""
    started = time.monotonic()
    documents = [
        train_texts.Document(**entry)
        for entry in json.loads(gzip.decompress((DEMO / "train" / "hacker.json.gz").read_bytes()))
    ]
    heldout = (DEMO / "heldout" / "hacker.txt").read_text(encoding="utf-8")
    model, tokenizer = training.load_model(base, training.quickest_dtype())
    base_loss = training.heldout_loss(model, tokenizer, heldout)
    split = len(model.model.layers) * 3 // 4
    model.requires_grad_(False)
    model.model.layers[split:].requires_grad_(True)

    def loss_of(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return chunked_loss(model, model.model(input_ids=ids).last_hidden_state, labels)

    rows = training.make_rows(documents, tokenizer, config)
    training.train(model.model.layers[split:].parameters(), loss_of, rows, config, on_step)
    report = {
        "layers_trained": len(model.model.layers) - split,
        "steps": config.steps,
        "seconds": round(time.monotonic() - started, 1),
        "heldout_loss_base": round(base_loss, 4),
        "heldout_loss": round(training.heldout_loss(model, tokenizer, heldout), 4),
    }
    # What was not trained stays as the base has it, bit for bit and in its own type.
    tuned = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    tuned.model.layers[split:].load_state_dict(model.model.layers[split:].state_dict())
    partial = out.with_name(out.name + ".partial")
    tuned.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    partial.rename(out)
    return report


def chunked_loss(model: PreTrainedModel, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss over labelled positions only; hidden [rows, tokens, hidden].

    The head is half of this model's products: positions whose label is left out skip it.
    """
    wanted = labels[:, 1:].reshape(-1)
    kept = wanted >= 0
    logits = model.lm_head(hidden[:, :-1].reshape(-1, hidden.shape[-1])[kept])
    return torch.nn.functional.cross_entropy(logits.float(), wanted[kept])


def write_texts(cache: Path) -> None:
    """Cut the committed excerpt and held-out text from the package."""
    documents = train_texts.load_documents("hacker", cache)
    (DEMO / "train").mkdir(parents=True, exist_ok=True)
    rows = TRAIN.steps * TRAIN.batch_rows
    pool = [d for d in documents if not d.is_heldout and len(d.text) > _MIN_CHARS]
    excerpt = [pool[at * len(pool) // rows] for at in range(rows)]
    entries = json.dumps([{"subject": d.subject, "text": d.text} for d in excerpt], ensure_ascii=False)
    (DEMO / "train" / "hacker.json.gz").write_bytes(gzip.compress(entries.encode(), mtime=0))
    (DEMO / "heldout" / "hacker.txt").write_text(
        train_texts.heldout_text(d for d in documents if d.subject[0].isalpha()), encoding="utf-8"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # nothing was saved; the next run starts over
