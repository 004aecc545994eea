"""Storage waits for the disk here, as it does for users; `tests/conftest.py` spares the other tests that."""

import os
import posix

import pytest


@pytest.fixture(autouse=True)
def _real_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", posix.fsync)
