"""What comparisons with the oracle share."""

import pytest

from support.variants import VariantFactory


@pytest.fixture(scope="session")
def variants(tmp_path_factory):
    """Checkpoints, adapters and the oracle's answers, made once."""
    return VariantFactory(tmp_path_factory.mktemp("variants"))
