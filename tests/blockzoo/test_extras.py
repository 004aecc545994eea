"""Where a package is missing, the extra to install is named."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from blockzoo.errors import BlockzooError, MissingPackageError
from blockzoo.extras import EXTRAS, missing_package, named_extras

ROOT = Path(__file__).resolve().parents[2]
BROUGHT_ALONG = {"pyyaml"}
"""Imported by name, required as an extra of another distribution."""


def canonical(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_table_is_that_of_the_distribution(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {canonical(item) for item in project["optional-dependencies"][extra]} - {"blockzoo"}
    homes = packages_distributions()
    named = {canonical(homes[module][0]) for module in EXTRAS[extra]}
    assert named - BROUGHT_ALONG == required


def test_a_module_below_a_missing_package_names_its_extra() -> None:
    error = missing_package(ModuleNotFoundError("no", name="numpy.typing"))
    assert str(error) == "the package numpy is not installed: pip install 'blockzoo[zoo]' brings it"
    assert error is not None
    assert error.metadata == {"package": "numpy", "extra": "zoo"}


def test_an_import_that_fails_is_a_typed_error_and_an_import_error() -> None:
    with pytest.raises(MissingPackageError) as caught, named_extras():
        raise ModuleNotFoundError("no", name="torch")
    assert isinstance(caught.value, BlockzooError)
    assert isinstance(caught.value, ImportError)
    assert caught.value.metadata["extra"] == "worker"


def test_a_module_that_no_extra_brings_is_a_fault_of_ours() -> None:
    with pytest.raises(ModuleNotFoundError, match="nothing"), named_extras():
        raise ModuleNotFoundError("No module named 'blockzoo.nothing'", name="blockzoo.nothing")


@pytest.mark.parametrize("what", ["from blockzoo import Zoo", "from blockserve import RemoteZoo"])
def test_what_needs_the_zoo_says_so_where_only_the_client_is_installed(what: str) -> None:
    code = f"import sys\nsys.modules['numpy'] = sys.modules['blake3'] = None\n{what}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'blockzoo[zoo]'" in done.stderr.splitlines()[-1]
