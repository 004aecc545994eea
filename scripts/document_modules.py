"""Write the list of modules in docs/map.md, room by room: one line each, the first of its docstring."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "map.md"
MARK = "<!-- what follows is made by `make docs` -->"
PACKAGES = {
    "blockzoo": ROOT,
    "blockkernels": ROOT / "kernels",
    "blockproto": ROOT / "proto",
    "blockserve": ROOT / "services",
}


def modules() -> Iterator[tuple[str, str, str]]:
    """Room, name and first docstring line of every module; generated stubs and `__main__` are left out."""
    for package, source_root in PACKAGES.items():
        for path in sorted((source_root / package).rglob("*.py"), key=_order):
            if "_pb2" in path.name or path.name == "__main__.py":
                continue
            parts = path.relative_to(source_root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            line = doc.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
            yield ".".join(parts[:-1]), name, line


def _order(path: Path) -> tuple[str, ...]:
    """A room's own modules before the rooms inside it."""
    return (*(f"2{part}" for part in path.parent.parts), f"1{path.name}")


def render() -> str:
    """A table for each room."""
    rooms: dict[str, list[str]] = {}
    for room, name, line in modules():
        rooms.setdefault(room, []).append(f"| `{name}` | {line} |")
    return "\n".join(
        f"\n### {room}\n\n| module | what |\n|---|---|\n" + "\n".join(rows) for room, rows in rooms.items()
    )


def main() -> int:
    """Replace what stands after the mark."""
    written, mark, _ = DOCUMENT.read_text(encoding="utf-8").partition(MARK)
    if not mark:
        print(f"{DOCUMENT} lacks the line {MARK}", file=sys.stderr)
        return 1
    DOCUMENT.write_text(f"{written}{MARK}\n{render()}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
