"""Writes docs/configuration.md from the settings models; `--check` fails when the file is out of date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blockserve.cli.settings_options import SettingInfo, iterate_settings
from blockserve.controller.settings import ControllerSettings
from blockserve.embedded.config import ServeConfig
from blockserve.router.settings import RouterSettings
from blockserve.worker.settings import WorkerSettings

TARGET = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
TITLES = {
    "": "Server",
    "router": "Limits on requests (`router`)",
    "controller": "The zoo over the network (`controller`)",
    "engine": "Engine (`engine`)",
}
CLUSTER = {"worker": WorkerSettings, "router": RouterSettings, "controller": ControllerSettings}
HEAD = """# Configuration

<!-- Made by scripts/config_docs.py from the settings models: change a model, then run the script. -->

`blockzoo serve`, and the processes of a cluster, take each setting from the first of: its command line
option, its environment variable, the YAML file that `--config` or `BLOCKZOO_CONFIG` names, the default. A
setting that is not known is an error in the file.

```yaml
zoo: ./zoo
listen: 127.0.0.1:7450
preload: [all]
router:
  max_output_tokens: 2048
engine:
  kv_cache_bytes: 4000000000
```

In the environment, lists are JSON: `BLOCKZOO_PRELOAD='["kjv", "base"]'`.
"""


def render() -> str:
    """The whole page."""
    parts, section = [HEAD], None
    for setting in iterate_settings(ServeConfig):
        if setting.section != section:
            section = setting.section
            parts.append(f"\n## {TITLES.get(section, section)}\n")
        parts.append(_entry(setting))
    known = {setting.path: setting for setting in iterate_settings(ServeConfig)}
    for verb, model in CLUSTER.items():
        parts.append(f"\n## `blockzoo {verb}`: what it has beside, or sets otherwise\n")
        own = [setting for setting in iterate_settings(model) if known.get(setting.path) != setting]
        parts.extend(map(_entry, own))
    return "\n".join(parts)


def _entry(setting: SettingInfo) -> str:
    unit = f" {setting.unit}" if setting.unit and setting.default is not None else ""
    option = "not an option, because process lists show those" if setting.is_secret else f"`{setting.flag}`"
    lines = [
        f"### `{setting.path}`",
        "",
        setting.meaning,
        "",
        f"- default: `{setting.describe_default()}`{unit}",
        f"- option: {option}; environment: `{setting.variable}`",
    ]
    if setting.reason:
        lines.append(f"- why: {setting.reason}")
    return "\n".join([*lines, ""])


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args().check:
        TARGET.write_text(render(), encoding="utf-8")
        return 0
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == render():
        return 0
    print(f"{TARGET.name} is out of date: run scripts/config_docs.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
