import pytest

from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a small right checkpoint, for a test to spoil."""
    return write_checkpoint(tmp_path / "model", CONFIGS["llama"]).folder


@pytest.fixture
def without_bf16(monkeypatch):
    """OpenVINO's backend as on a processor that multiplies no bfloat16, whatever this one does."""
    monkeypatch.setattr("penstock.backends.openvino.source._multiplies_bfloat16", lambda core: False)
