#!/usr/bin/env bash
# transformers 5.23.0: Gemma 3's `attn_logit_softcapping` is documented and stored, and never used.
# Exit status: 0 the behaviour is as described, 1 it has changed, 2 the packages could not be installed.
#
# Gemma2Config and Gemma3TextConfig document the field in the same words, and config.json holds it. Gemma 2 caps the
# scores of attention with it; Gemma 3's attention keeps the value and does not hand it on, so logits with and without
# it are equal. Who implements the documented field disagrees with transformers.
#
# Seen with transformers 5.23.0 and torch 2.13.0: largest difference of logits 5.677 for Gemma 2, 0.0 for Gemma 3.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv >&2 || exit 2
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 >&2 || exit 2
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import sys
import warnings

warnings.simplefilter("ignore")
import torch
import transformers

transformers.logging.set_verbosity_error()
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "final_logit_softcapping": None,
}


def logits(kind, cap):
    config = getattr(transformers, f"{kind}Config")(**SIZES, attn_logit_softcapping=cap)
    config._attn_implementation = "eager"
    model = getattr(transformers, MODELS[kind])(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return model(torch.arange(1, 13)[None]).logits


MODELS = {"Gemma2": "Gemma2ForCausalLM", "Gemma3Text": "Gemma3ForCausalLM"}
found = {kind: (logits(kind, 1.0) - logits(kind, None)).abs().max().item() for kind in MODELS}
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"gemma2: largest difference {found['Gemma2']:.3f}")
print(f"gemma3: largest difference {found['Gemma3Text']}")
sys.exit(not (found["Gemma2"] > 0.01 and found["Gemma3Text"] == 0.0))
PYTHON
