#!/usr/bin/env bash
# transformers 5.23.0: a Phi-3 config whose rope type is "su" cannot be read, though the class converts that name.
# Exit status: 0 the behaviour is as described, 1 it has changed, 2 the packages could not be installed.
#
# The first releases of Phi-3 with 128k tokens call their scaling "su"; later ones call the same numbers "longrope".
# Phi3Config turns "su" and "yarn" into "longrope" for such checkpoints. The step before fills in
# original_max_position_embeddings for the types it knows, and "su" is none of them, so the converted parameters lack
# it and are refused with a KeyError. "yarn" is known, so it is converted and read.
#
# Seen with transformers 5.23.0: longrope and yarn become longrope; su is a KeyError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv >&2 || exit 2
venv/bin/python -m pip install --quiet --disable-pip-version-check transformers==5.23.0 >&2 || exit 2
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import sys

import transformers
from transformers import Phi3Config

transformers.logging.set_verbosity_error()


def read(kind):
    scaling = {"type": kind, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    try:
        config = Phi3Config(
            rope_scaling=scaling, max_position_embeddings=131072, original_max_position_embeddings=4096
        )
    except KeyError as error:
        return f"KeyError: {error.args[0]}"
    return config.rope_parameters["rope_type"]


found = {kind: read(kind) for kind in ("longrope", "yarn", "su")}
print(f"transformers {transformers.__version__}")
for kind, outcome in found.items():
    print(f"{kind}: {outcome}")
expected = found["longrope"] == found["yarn"] == "longrope" and found["su"].startswith("KeyError")
sys.exit(not (expected and "original_max_position_embeddings" in found["su"]))
PYTHON
