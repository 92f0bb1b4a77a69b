"""What the torch backend tells of rows whose likeliest tokens decide, and that an engine draws the same from it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from penstock.backends.checkpoint import read_model
from penstock.backends.conformance import CHECKS, subjects, top
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.contract import DeviceConfig, DType
from penstock.backends.pytorch import REGISTRATION
from penstock.backends.pytorch.model import TorchModel
from penstock.backends.pytorch.top import top_of
from penstock.executor.engine import Engine, EngineConfig
from penstock.executor.sampling import Row, Sampler, SamplingParameters
from penstock.executor.sequence import SequenceRequest

SIZE = 24
ODD = [np.nan, np.inf, -np.inf, 0.0, -0.0]
rows = arrays.arrays(np.float32, (5, SIZE), elements=st.sampled_from([*ODD, 1.0, 1.5, 2.0]) | st.floats(-4, 4, width=32))
counts = arrays.arrays(np.int32, 5, elements=st.integers(0, 8))
ASKED = [
    SamplingParameters(temperature=0),
    SamplingParameters(temperature=0.7, top_k=1),
    SamplingParameters(temperature=0.6, top_k=4, top_p=0.9, seed=5),
    SamplingParameters(temperature=2.0, top_k=8, min_p=0.1, seed=9),
    SamplingParameters(temperature=1.0, top_k=9),  # more than is told
    SamplingParameters(temperature=1.0, top_p=0.8, seed=3),
    SamplingParameters(temperature=0.8, top_k=3, presence_penalty=0.5),
]


@given(rows, counts)
def test_it_tells_the_likeliest_and_those_as_likely_or_the_row(logits, wanted):
    found = top_of(torch.from_numpy(logits), wanted)
    for r, (row, count) in enumerate(zip(logits, wanted, strict=True)):
        ids = found.ids[found.starts[r] : found.starts[r + 1]]
        if found.whole[r] >= 0:
            np.testing.assert_array_equal(found.logits[found.whole[r]], row)
            assert not len(ids)
        else:
            assert count
            assert np.isfinite(row.max())
            np.testing.assert_array_equal(ids, np.flatnonzero(row >= np.sort(row)[-count]))
            np.testing.assert_array_equal(found.values[found.starts[r] : found.starts[r + 1]], row[ids])
    assert len(found.logits) == (found.whole >= 0).sum()


def test_ordinary_rows_stay_on_the_device():
    logits = torch.randn(6, 5000, generator=torch.Generator().manual_seed(0))
    found = top_of(logits, np.array([1, 50, 0, 1, 7, 50], np.int32))
    assert found.whole.tolist() == [-1, -1, 0, -1, -1, -1]
    assert np.diff(found.starts).tolist() == [1, 50, 0, 1, 7, 50]


@given(rows, st.sampled_from(ASKED), st.integers(0, 99))
def test_what_is_told_is_enough_to_draw_the_same(logits, parameters, position):
    row = Row(parameters, position)
    if not 0 < row.deciding <= 8:
        return
    found = top_of(torch.from_numpy(logits), np.full(5, row.deciding, np.int32))
    for r in np.flatnonzero(found.whole < 0):
        few = slice(found.starts[r], found.starts[r + 1])
        (right,) = Sampler(SIZE).sample(logits[r : r + 1].copy(), [row])
        assert Sampler(SIZE).sample_likeliest(found.ids[few], found.values[few], row) == right


@pytest.mark.parametrize("check", top.__all__)
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_it_conforms(check, dtype, tmp_path):
    def create(spec, config):
        return TorchModel(spec, replace(config, device="cpu"), most_top=30)

    (subject,) = subjects(replace(REGISTRATION, create=create), tmp_path, families=("qwen3",), dtype=dtype)
    CHECKS[check](subject)


def answers(spec, most_top):
    """Tokens of sequences that are asked for in all these ways, some with log-probabilities, and how many rows were told whole."""
    config = DeviceConfig(kv_cache_bytes=1 << 20, device="cpu", dtype=DType.F32, threads=1)
    model = TorchModel(spec, config, most_top=most_top)
    told, step_top = [], model.step_top
    model.step_top = lambda *asked: told.append(step_top(*asked)) or told[-1]
    engine = Engine(model, EngineConfig(vocabulary_size=320, context_length=512, max_batch_tokens=64, max_batch_size=16))
    frames = []
    for i, parameters in enumerate(ASKED * 2):
        extra = {"logprobs": 2, "prompt_logprobs": 1} if i == 3 else {"min_tokens": 3, "stop_ids": [7]} if i == 4 else {}
        request = SequenceRequest(sequence_id=i, prompt=list(range(i + 1, 30)), max_tokens=12, sampling=parameters, **extra)
        engine.submit(request, frames.append)
    while not engine.idle:
        engine.step()
    engine.close()
    tokens = sorted(
        (i, position, token) for f in frames for i, position, token in zip(f.sequence_ids, f.positions, f.token_ids, strict=True)
    )
    logprobs = [(i, p, told) for f in frames for i, p, told in f.logprobs] + [told for f in frames for told in f.prompt_logprobs]
    return tokens, logprobs, told


def test_an_engine_draws_the_same_tokens_from_what_is_told(tmp_path):
    spec = read_model(write_checkpoint(tmp_path, CONFIGS["llama"]).folder, "m")
    whole, few = answers(spec, 0), answers(spec, 8)
    assert whole[:2] == few[:2]
    assert len(whole[0]) == 12 * 2 * len(ASKED)
    assert not whole[2]
    stayed = sum((told.whole < 0).sum() for told in few[2])
    assert stayed >= 12 * 6  # greedy and top-k below nine, without penalties and log-probabilities


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="finds the likeliest on a CUDA or ROCm device")
def test_a_device_tells_the_same():
    logits = torch.randn(64, 50_000, generator=torch.Generator().manual_seed(1)).bfloat16().float()  # with many that are equal
    wanted = np.resize(np.array([1, 20, 0, 5], np.int32), 64)
    here, there = top_of(logits, wanted), top_of(logits.cuda(), wanted)
    for name in ("starts", "ids", "values", "whole", "logits"):
        np.testing.assert_array_equal(getattr(here, name), getattr(there, name))
