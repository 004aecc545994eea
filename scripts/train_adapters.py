"""Train the demo's LoRA adapters with PEFT and write what the demo needs to check them.

Writes `demo/adapters/<name>/` (PEFT format, bf16), `demo/heldout/<name>.txt` and
`demo/losses.json` (held-out loss of base and adapter, nats per token, in fp32). Each adapter
touches other modules, at another rank, so that the demo serves three shapes of LoRA at once.

    python scripts/train_adapters.py --model .cache/smollm2            # all three
    python scripts/train_adapters.py --model .cache/smollm2 kjv        # one
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

import train_texts
import training
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file


@dataclass(frozen=True, slots=True)
class Recipe:
    """One adapter: its rank, the modules it touches, how long it is trained."""

    rank: int
    modules: tuple[str, ...]
    train: training.TrainConfig

    @property
    def lora(self) -> LoraConfig:
        """PEFT's form; alpha is twice the rank."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank,
            lora_dropout=0.0,
            target_modules=list(self.modules),
            task_type="CAUSAL_LM",
        )


RECIPES = {
    "kjv": Recipe(4, ("q_proj", "v_proj"), training.TrainConfig(steps=90, learning_rate=2e-3)),
    "bierce": Recipe(4, ("v_proj", "o_proj"), training.TrainConfig(steps=90, learning_rate=2e-3)),
    "spanish": Recipe(
        2, ("q_proj", "v_proj", "o_proj", "down_proj"), training.TrainConfig(steps=120, learning_rate=3e-3)
    ),
}


def main() -> None:
    """Train the named adapters."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(RECIPES)}; none means all")
    parser.add_argument("--model", type=Path, required=True, help="base checkpoint folder")
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for adapters, texts and losses"
    )
    parser.add_argument(
        "--texts", type=Path, default=Path(".cache/texts"), help="folder for the text packages"
    )
    args = parser.parse_args()
    for name in args.names or RECIPES:
        if name not in RECIPES:
            parser.error(f"{name!r} is none of {', '.join(RECIPES)}")
        losses = train_adapter(name, args.model, args.out, args.texts)
        _note_losses(args.out / "losses.json", name, losses)
        print(json.dumps({name: losses}), flush=True)


def train_adapter(name: str, base: Path, out: Path, texts: Path) -> dict[str, float]:
    """Train one adapter, save it and its held-out text, and return the losses."""
    recipe = RECIPES[name]
    documents = train_texts.load_documents(name, texts)
    heldout = train_texts.heldout_text(documents)
    (out / "heldout").mkdir(parents=True, exist_ok=True)
    (out / "heldout" / f"{name}.txt").write_text(heldout, encoding="utf-8")

    torch.manual_seed(recipe.train.seed)
    model, tokenizer = training.load_model(base)
    rows = training.make_rows(documents, tokenizer, recipe.train)
    peft_model = get_peft_model(model, recipe.lora)
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()  # steps of a bf16 A and B would round away

    def loss_of(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return training.next_token_loss(peft_model(input_ids=ids).logits, labels)

    started = time.monotonic()
    training.train(trained, loss_of, rows, recipe.train, training.print_steps(name, recipe.train.steps))
    print(f"{name}: trained in {time.monotonic() - started:.0f} s", flush=True)
    _save(peft_model, out / "adapters" / name)
    return _losses(base, out / "adapters" / name, heldout)


def _save(model: PeftModel, folder: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    weights = folder / "adapter_model.safetensors"
    save_file(
        {key: value.to(torch.bfloat16) for key, value in load_file(weights).items()},
        weights,
        {"format": "pt"},
    )
    weights.chmod(0o644)


def _losses(base: Path, adapter: Path, heldout: str) -> dict[str, float]:
    """Held-out losses of base and adapter as saved, computed in fp32."""
    model, tokenizer = training.load_model(base)
    model.float().eval()
    base_loss = training.heldout_loss(model, tokenizer, heldout)
    adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
    return {
        "base": round(base_loss, 4),
        "adapter": round(training.heldout_loss(adapted, tokenizer, heldout), 4),
    }


def _note_losses(path: Path, name: str, losses: dict[str, float]) -> None:
    noted = json.loads(path.read_text()) if path.exists() else {}
    noted[name] = losses
    path.write_text(json.dumps(dict(sorted(noted.items())), indent=2) + "\n")


if __name__ == "__main__":
    main()
