"""The shape of the repository: packages, import layers, what runs without torch, what documents promise."""

import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import blockkernels
import blockproto
import blockserve
import blockzoo

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = (blockzoo, blockserve, blockkernels, blockproto)
MIRRORED = {
    "tests/blockzoo": "blockzoo",
    "tests/services": "services/blockserve",
    "tests/kernels": "kernels/blockkernels",
}
"""Folders of tests that have the shape of a package, and the package."""
COMPUTING = (
    "blockzoo.compute.",
    "blockzoo.evaluation.forward",
    "blockzoo.evaluation.measure",
    "blockzoo.quantising.blocks",
)


def module_names():
    """All modules of the four packages, generated ones left out."""
    for package in PACKAGES:
        yield package.__name__
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if "_pb2" not in module.name:
                yield module.name


@pytest.mark.parametrize(
    "folder", ["proto", "services", "kernels", "tests", "deploy", "scripts", "benchmarks"]
)
def test_source_roots_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_tests_are_no_packages():
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("name", ["kernels", "services", "proto", "deploy"])
def test_no_folder_of_ours_hides_a_package(name):
    """transformers, for one, asks whether a package named `kernels` can be imported."""
    spec = importlib.util.find_spec(name)
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    assert not [place for place in places if place and Path(place).is_relative_to(ROOT / name)]


@pytest.mark.parametrize(("tests", "source"), MIRRORED.items())
def test_tests_stand_where_the_modules_they_test_stand(tests, source):
    """`test_MODULE.py` or `test_MODULE_ASPECT.py`, for a module or package of the folder that is mirrored."""
    found = sorted((ROOT / tests).rglob("test_*.py"))
    assert found
    for path in found:
        folder = ROOT / source / path.parent.relative_to(ROOT / tests)
        assert folder.is_dir(), f"{path.relative_to(ROOT)} mirrors no folder"
        modules = {one.stem for one in folder.iterdir() if one.suffix == ".py" or one.is_dir()}
        subject = path.stem.removeprefix("test_")
        assert any(f"{subject}_".startswith(f"{module}_") for module in modules), (
            f"{path.relative_to(ROOT)} names no module of {folder.relative_to(ROOT)}"
        )


def test_every_package_says_that_it_is_typed():
    for package in PACKAGES:
        assert (Path(package.__path__[0]) / "py.typed").exists()


def test_every_module_has_a_docstring():
    for name in module_names():
        spec = importlib.util.find_spec(name)
        text = Path(spec.origin).read_text()
        assert re.match(r'\s*(#.*\n)*(r?""")', text) or not text.strip(), name


def test_import_layers():
    command = [
        str(Path(sys.executable).with_name("lint-imports")),
        "--no-cache",
        "--config",
        ROOT / "pyproject.toml",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "package",
    [
        "blockzoo",
        "blockserve.common",
        "blockserve.router",
        "blockserve.controller",
        "blockserve.embedded",
        "blockserve.cli",
    ],
)
def test_imports_without_torch(package):
    """Every module that is not about computing imports where torch is not installed."""
    exempt = {"blockserve.cli.__main__", "blockserve.embedded.__main__"}
    modules = [
        name
        for name in module_names()
        if f"{name}.".startswith(f"{package}.") and not f"{name}.".startswith(COMPUTING)
    ]
    assert len(modules) > 3
    code = (
        "import importlib, sys\n"
        "for blocked in ('torch', 'transformers', 'peft', 'triton'):\n"
        "    sys.modules[blocked] = None\n"
        f"for name in {sorted(set(modules) - exempt)!r}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_map_lists_every_module():
    text = (ROOT / "docs" / "map.md").read_text()
    listed = set(re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE))
    existing = {name for name in module_names() if not name.endswith("__main__")}
    assert existing - listed == set(), "docs/map.md lacks modules: run `make docs`"
    assert listed - existing == set(), "docs/map.md lists modules that are gone: run `make docs`"


def canonical(requirement):
    """The name in a requirement or pin, as package indexes compare them."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~ ]", requirement)[0]).lower()


def test_constraints_pin_what_is_required():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonical(line) for line in lines if line and not line.startswith("#")}
    required = [*PYPROJECT["project"]["dependencies"], *PYPROJECT["build-system"]["requires"]]
    for extra in PYPROJECT["project"]["optional-dependencies"].values():
        required += extra
    assert {canonical(item) for item in required} - {"blockzoo"} - pinned == set()


def test_local_links_in_documents_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_generated_stubs_came_from_the_floor():
    """Newer runtimes accept stubs of older tools, never the other way round."""
    required = dict(item.split(">=") for item in PYPROJECT["project"]["dependencies"])
    for stub in (ROOT / "proto" / "blockproto" / "v1").glob("*_pb2.py"):
        version = re.search(r"Protobuf Python Version: ([\d.]+)", stub.read_text())[1]
        assert as_numbers(version) <= as_numbers(required["protobuf"])
    for stub in (ROOT / "proto" / "blockproto" / "v1").glob("*_pb2_grpc.py"):
        version = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", stub.read_text())[1]
        assert as_numbers(version)[:2] <= as_numbers(required["grpcio"])[:2]


def as_numbers(version):
    return [int(part) for part in version.split(".")]


def test_the_licence_is_the_whole_text():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert text.rstrip().endswith("limitations under the License.")
    assert len(text) == 11358
