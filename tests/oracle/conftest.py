"""What comparisons with the oracle share."""

import pytest


@pytest.fixture(scope="session")
def variants(factory):
    """Checkpoints, adapters and the oracle's answers, made once."""
    return factory


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """An engine over an empty zoo; all memory it asks for is poisoned."""
    from support.engine import EngineHarness
    from support.memory import poisoned_memory

    with poisoned_memory(), EngineHarness(tmp_path_factory.mktemp("zoo")) as harness:
        yield harness
