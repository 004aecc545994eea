"""Writes docs/configuration.md from the settings models; `--check` fails when the file is out of date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blockserve.cli.options.settings import SettingInfo, iterate_settings
from blockserve.cli.verbs.serve import CLUSTER, SERVE

TARGET = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
TITLES = {
    "": "Process",
    "router": "Limits on requests (`router`)",
    "controller": "The zoo over the network (`controller`)",
    "engine": "Engine (`engine`)",
    "state": "Shared state (`state`)",
    "failover": "Requests that lose a worker (`failover`)",
    "adaptive": "Approved equivalents (`adaptive`)",
    "kv": "Keys and values that follow a request (`kv`)",
}
HEAD = """# Configuration

<!-- Made by scripts/config_docs.py from the settings models: change a model, then run the script. -->

`blockzoo serve`, `worker`, `router` and `controller` take each setting from the first of: its command
line option, its environment variable, the YAML file that `--config` or `BLOCKZOO_CONFIG` names, the default.
A setting that is not known is an error in the file.

```yaml
zoo: ./zoo
listen: 127.0.0.1:7450
preload: [all]
router:
  max_output_tokens: 2048
engine:
  kv_cache_bytes: 4000000000
```

In the environment, lists are JSON: `BLOCKZOO_PRELOAD='["kjv", "base"]'`. `blockzoo up` starts processes with
the environment that it has, so whatever is set there holds for all of them.
"""


Entry = tuple[SettingInfo, list[str]]
"""A setting and the verbs that have it just so."""


def sections() -> dict[str, list[Entry]]:
    """The settings of all processes by section, those of one path together."""
    found: dict[str, list[Entry]] = {section: [] for section in TITLES}
    for service in (SERVE, *CLUSTER):
        for setting in iterate_settings(service.settings()):
            entries = found[setting.section]
            same = [verbs for known, verbs in entries if known == setting]
            if same:
                same[0].append(service.name)
                continue
            akin = [place for place, (known, _) in enumerate(entries) if known.path == setting.path]
            entries.insert(akin[-1] + 1 if akin else len(entries), (setting, [service.name]))
    return found


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    for section, entries in sections().items():
        parts.append(f"\n## {TITLES[section]}\n")
        parts += [_entry(setting, verbs) for setting, verbs in entries]
    return "\n".join(parts)


def _entry(setting: SettingInfo, verbs: list[str]) -> str:
    unit = f" {setting.unit}" if setting.unit and setting.default is not None else ""
    option = "not an option, because process lists show those" if setting.is_secret else f"`{setting.flag}`"
    lines = [
        f"### `{setting.path}`",
        "",
        setting.meaning,
        "",
        f"- of: {', '.join(f'`{verb}`' for verb in verbs)}",
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
