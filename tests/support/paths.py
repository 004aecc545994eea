"""Where things are in the repository, for tests wherever they stand themselves."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
TINY_ZOO = ROOT / "tests" / "blockzoo" / "data" / "tiny-zoo"
"""A zoo as the first release wrote it; every later version must open it."""
