"""Write docs/configuration.md from the settings of `blockzoo serve`; `--check` only compares."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

from blockserve.cli.settings_options import SettingInfo, iterate_settings
from blockserve.embedded.config import ServeConfig

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """\
# Configuration of `blockzoo serve`

Made by `scripts/document_settings.py` from the settings models; do not edit.

A value comes from the first of: the command line (`--kv-cache-bytes 4000000000`), the environment
(`BLOCKZOO_ENGINE_KV_CACHE_BYTES`), the YAML file that `--config` or `BLOCKZOO_CONFIG` names, the default.
Options on the command line leave out the section's name.

```yaml
zoo: s3://models/zoo
preload: [all]
engine:
  kv_cache_bytes: 4000000000
router:
  max_output_tokens: 2048
```
"""
TITLES = {
    "": "Server",
    "router": "`router`: limits on requests",
    "engine": "`engine`: memory, batching, device",
}


def render() -> str:
    """The document."""
    parts = [HEAD]
    for section, settings in groupby(iterate_settings(ServeConfig), lambda setting: setting.section):
        parts.append(f"\n## {TITLES.get(section, section)}\n")
        parts += [_entry(setting) for setting in settings]
    return "\n".join(parts)


def _entry(setting: SettingInfo) -> str:
    unit = f", {setting.unit}" if setting.unit else ""
    flag = "not an option" if setting.is_secret else f"`{setting.flag}`"
    why = f" {setting.reason}" if setting.reason else ""
    return (
        f"### `{setting.path}`\n\n{setting.meaning}\n\n"
        f"- {flag}, `{setting.variable}`; {_type_name(setting.annotation)}{unit}\n"
        f"- Default: `{setting.describe_default()}`.{why}\n"
    )


def _type_name(annotation: Any) -> str:
    names = {str: "text", int: "integer", float: "number", bool: "yes or no", Path: "path"}
    if annotation in names:
        return names[annotation]
    items = [item for item in get_args(annotation) if item not in (type(None), Ellipsis)]
    if items and all(isinstance(item, str) for item in items):
        return "one of " + ", ".join(f"`{item}`" for item in items)
    if getattr(annotation, "__origin__", None) is tuple:
        return f"list of {_type_name(items[0])}"
    return _type_name(items[0]) if items else "text"


def main() -> int:
    """Write, or compare with `--check`."""
    text = render()
    if "--check" in sys.argv[1:]:
        if DOCUMENT.exists() and DOCUMENT.read_text(encoding="utf-8") == text:
            return 0
        print(f"{DOCUMENT} is not what the settings say: run `make docs`", file=sys.stderr)
        return 1
    DOCUMENT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
