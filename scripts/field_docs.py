#!/usr/bin/env python3
"""Write the tables of fields in docs/compatibility.md from `blockzoo.folders.fields`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

from transformers import CONFIG_MAPPING

from blockzoo.families import for_architecture, supported
from blockzoo.folders.fields import ADAPTER_FIELDS, CONFIG_FIELDS, FIELDS, Field, Treatment
from blockzoo.folders.files import ADAPTER_CONFIG

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
BEGIN, END = "<!-- fields: written by scripts/field_docs.py -->\n", "<!-- end of fields -->"


def tables() -> Iterator[str]:
    """The lines between the marks."""
    yield ""
    yield "| config.json | treatment | what it is |"
    yield "|---|---|---|"
    yield from rows(CONFIG_FIELDS)
    for architecture in supported():
        names = ", ".join(f"`{name}`" for name in fields_read(architecture))
        yield f"| {names} | applied, or refused by name | {architecture} |"
    for file, fields in {**FIELDS, ADAPTER_CONFIG: ADAPTER_FIELDS}.items():
        yield ""
        yield f"| {file} | treatment | what it is |"
        yield "|---|---|---|"
        yield from rows(fields)
    yield ""


def fields_read(architecture: str) -> list[str]:
    """Fields that a family asks for, of those that transformers writes for it."""
    family = for_architecture(architecture)
    config = CONFIG_MAPPING[family.model_type or family.name](architectures=[architecture]).to_dict()
    return sorted(config.keys() - set(family.plan(config).unread) - CONFIG_FIELDS.keys())


def rows(fields: Mapping[str, Field]) -> Iterator[str]:
    """One line for fields that follow each other and are treated alike."""
    for field, group in groupby(fields.items(), key=lambda item: item[1]):
        names = ", ".join(f"`{name}`" for name, _ in group)
        yield f"| {names} | {treatment(field)} | {field.meaning} |"


def treatment(field: Field) -> str:
    """The treatment in words."""
    if field.treatment is Treatment.NOTE:
        return "not used"
    if field.treatment is not Treatment.REFUSED or not (field.without_effect or field.sampled):
        return field.treatment
    notes = [", ".join(map(json.dumps, field.without_effect))] if field.without_effect else []
    if field.sampled:
        notes.append("anything without `do_sample`")
    return f"{field.treatment} ({'; '.join(notes)})"


def main() -> int:
    """0 when the page is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail instead of writing")
    check = parser.parse_args().check
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = before + BEGIN + "\n".join(tables()) + "\n" + END + after
    if page == wanted:
        return 0
    if check:
        print(f"{PAGE.name} is not up to date; run scripts/field_docs.py", file=sys.stderr)
        return 1
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
