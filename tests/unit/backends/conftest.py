import pytest

from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a small right checkpoint, for a test to spoil."""
    return write_checkpoint(tmp_path / "model", CONFIGS["llama"]).folder
