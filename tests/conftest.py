"""What every test shares: the factories of `tests/support`, the real model, and a clean environment."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from support.variants import VariantFactory

ROOT = Path(__file__).resolve().parent.parent

# `from support import ...` works in every test, but tests/ itself stays off the import path: its folders are
# called kernels, services and blockzoo, and transformers probes for a module named `kernels`.
_support = types.ModuleType("support")
_support.__path__ = [str(ROOT / "tests" / "support")]
sys.modules["support"] = _support

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported anywhere
# Most models here are tiny; on a busy machine threads that wait for each other cost ten times the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before the kernels are defined: without a GPU they can only be interpreted (support/triton_interpreter.py).
os.environ.setdefault("TRITON_INTERPRET", "1")
# Where triton can be imported, torch sets this when a model computes; forked programs need one environment.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"inductor-{os.getuid()}"))
if "PYTEST_XDIST_WORKER" in os.environ:
    # Teams of threads that wait busily slow down whoever shares their cores (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# On a busy machine an example takes ten times as long as alone.
settings.register_profile("blockzoo", deadline=None)
settings.load_profile("blockzoo")

# Without a loss of power nothing that a test could see depends on fsync, and registering a tiny model waits
# for the disk some fifty times. tests/blockzoo/storage has the real one.
os.fsync = lambda fd: None
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script. Programs under test would inherit it and never see Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own BLOCKZOO_* settings must not change what a test sees."""
    for name in list(os.environ):
        if name.startswith("BLOCKZOO_") and name != "BLOCKZOO_TEST_MODEL":
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def factory(tmp_path_factory: pytest.TempPathFactory) -> VariantFactory:
    """Checkpoints, adapters and the oracle's answers, made once a session.

    A test must not change what is in their folders; `support.models.edit_checkpoint` copies.
    """
    from support.variants import VariantFactory

    return VariantFactory(tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a bf16 checkpoint folder; mark such tests with `model`."""
    path = Path(os.environ.get("BLOCKZOO_TEST_MODEL", ROOT / ".cache" / "smollm2"))
    if not (path / "config.json").is_file():
        pytest.skip(f"no checkpoint in {path}: run `make model` or set BLOCKZOO_TEST_MODEL")
    return path


CLUSTERS = ("tests/e2e/", "tests/scripts/test_demo_cluster.py", "tests/test_bench_cluster.py")
"""They start clusters of processes, which take both cores and time each other: one such test at a time."""
NO_CLUSTERS = ("tests/e2e/test_demo_assets.py",)
"""They stand among those and start none."""
LONG_FILES = ("tests/oracle/", "tests/services/worker/", "tests/kernels/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device; what takes longest comes first."""
    _skip_gpu(items)
    order = (*CLUSTERS, *LONG_FILES)
    items.sort(key=lambda item: [not item.nodeid.startswith(place) for place in order])  # stable


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2` one process takes the clusters and then helps the other one, which takes file after file.

    What a file prepares is prepared once.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name = nodeid.partition("::")[0]
            return "clusters" if name.startswith(CLUSTERS) and name not in NO_CLUSTERS else name

    return ByFile(config, log)


def _skip_gpu(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
