"""Fine-tune all layers in bf16 and save a full checkpoint (for the delta-rest bench).

Weights, gradients and AdamW's moments are bf16 throughout (no fp32 master copy), learning
rate 2e-5 at its peak, batches of 4 x 256 tokens. `--master fp32` keeps an fp32 master copy and
rounds to bf16 when saving: more weights then differ, which is the harder case to store.

    python scripts/train_full.py --model .cache/smollm2 --out .cache/full
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

import train_texts
import training


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="base checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="where the fine-tune is written")
    parser.add_argument("--domain", choices=sorted(train_texts.PACKAGES), default="kjv")
    parser.add_argument(
        "--texts", type=Path, default=Path(".cache/texts"), help="folder for the text packages"
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--master", choices=["bf16", "fp32"], default="bf16")
    args = parser.parse_args()

    documents = train_texts.load_documents(args.domain, args.texts)
    model, tokenizer = training.load_model(args.model)
    heldout = train_texts.heldout_text(documents)
    base_loss = training.heldout_loss(model, tokenizer, heldout)
    config = training.TrainConfig(steps=args.steps, learning_rate=args.learning_rate)
    rows = training.make_rows(documents, tokenizer, config)
    if args.master == "fp32":
        model.float()
    model.train()

    def loss_of(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.master == "fp32"):
            return training.next_token_loss(model(input_ids=ids).logits, labels)

    started = time.monotonic()
    training.train(model.parameters(), loss_of, rows, config, training.print_steps("full", args.steps))
    model.eval().to(torch.bfloat16)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    report = {
        "steps": args.steps,
        "learning_rate": args.learning_rate,
        "master": args.master,
        "domain": args.domain,
        "seconds": round(time.monotonic() - started, 1),
        "heldout_loss_base": round(base_loss, 4),
        "heldout_loss": round(training.heldout_loss(model, tokenizer, heldout), 4),
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
