import pytest

from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.openvino.properties import properties


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a small right checkpoint, for a test to spoil."""
    return write_checkpoint(tmp_path / "model", CONFIGS["llama"]).folder


@pytest.fixture
def without_bf16(monkeypatch):
    """OpenVINO's properties as for a processor that multiplies no bfloat16, whatever this one does."""

    def as_if(*arguments, has_bf16, **settings):
        return properties(*arguments, has_bf16=False, **settings)

    monkeypatch.setattr("penstock.backends.openvino.source.properties", as_if)
