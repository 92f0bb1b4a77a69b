"""Step times are found of every backend that computes a model: each takes a measurement's batches."""

from dataclasses import replace

import numpy as np
import pytest
from structlog.testing import capture_logs

from penstock.backends.checkpoint import read_model
from penstock.backends.contract import Available, DeviceConfig, DType
from penstock.backends.registry import backends
from penstock.executor.calibration import Shape, measure
from penstock.executor.config import ExecutorConfig
from penstock.executor.loading import load

REAL = [name for name, one in backends().items() if name != "fake" and isinstance(one.probe(), Available)]
SHAPE = Shape(max_batch_size=8, max_batch_tokens=256, context_length=512)


@pytest.fixture
def spec(checkpoints):
    return read_model(checkpoints("llama").folder, "tiny")


class Recorded:
    """A model whose clock goes on by a microsecond a token, and that holds each step to what stands in its blocks."""

    def __init__(self, model):
        self.kv, self.device = model.kv, model.device
        self.now = 0.0
        self.contexts = {}
        self._model = model
        self._written = {}

    def clock(self):
        return self.now

    def import_kv(self, blocks, chunk):
        for place in chunk.tokens:
            self._written[blocks[place // self.kv.block_size], place % self.kv.block_size] = blocks[0], place
        self._model.import_kv(blocks, chunk)

    def step(self, batch):
        for i, past in enumerate(batch.past_lengths.tolist()):
            blocks = batch.block_ids[batch.block_starts[i] : batch.block_starts[i + 1]].tolist()
            size, end = self.kv.block_size, past + int(batch.starts[i + 1] - batch.starts[i])
            for place in range(past):
                assert self._written.get((blocks[place // size], place % size)) == (blocks[0], place)
            for place in range(past, end):
                self._written[blocks[place // size], place % size] = blocks[0], place
        counts = np.diff(batch.starts)
        kind = "decode" if counts.max() == 1 else "prefill"
        self.contexts[kind] = max(self.contexts.get(kind, 0), int(batch.past_lengths.max()))
        self.now += 1e-6 * len(batch.token_ids)
        return self._model.step(batch)


@pytest.mark.parametrize("imports", [False, True])
@pytest.mark.parametrize("name", REAL)
def test_every_past_of_a_measurement_stands_in_the_cache(name, spec, imports):
    model = backends()[name].create(spec, DeviceConfig(threads=1, kv_cache_bytes=1 << 23, max_batch_size=8, max_batch_tokens=256))
    try:
        recorded = Recorded(model)
        times = measure(recorded, replace(SHAPE, imports=imports), 0.1, recorded.clock)
    finally:
        model.close()
    assert times.decode.sizes == (1, 2, 4, 8)
    assert times.prefill.sizes == (16, 32, 64, 128, 256)
    assert recorded.contexts["decode"] >= 128
    assert recorded.contexts["prefill"] >= 128


@pytest.mark.parametrize("name", REAL)
def test_a_start_finds_the_curves_of_the_backend(name, spec, tmp_path):
    settings = {"model": str(spec.folder), "backend": name, "threads": 1, "kv_cache_gib": 0.01, "max_batch_size": 4}
    with capture_logs() as logs:
        loaded = load(ExecutorConfig(**settings, cache_folder=str(tmp_path), calibration_seconds=0.3))
    loaded.engine.close()
    assert [line for line in logs if line["event"] == "calibration failed"] == []
    assert loaded.times is not None
    assert loaded.times.decode.sizes[0] == 1
    assert loaded.times.prefill.sizes[0] == 16
    assert list((tmp_path / "calibrations").iterdir())


@pytest.mark.parametrize("name", REAL)
def test_no_backend_rounds_weights_unless_asked(name, spec):
    first, *_ = backends()[name].capabilities(spec).dtypes
    assert first in {DType.F32, DType.BF16}
