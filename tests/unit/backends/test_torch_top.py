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
from penstock.backends.contract import DeviceConfig, DType, TopRequest
from penstock.backends.pytorch import REGISTRATION
from penstock.backends.pytorch.model import TorchModel
from penstock.backends.pytorch.top import ToldRows
from penstock.executor.engine import Engine, EngineConfig, EngineDead
from penstock.executor.sampling import Adjustment, Row, Sampler, SamplingParameters
from penstock.executor.sequence import Finish, SequenceRequest
from penstock.executor.step_logits import StepTop

SIZE = 24
ODD = [np.nan, np.inf, -np.inf, 0.0, -0.0]
rows = arrays.arrays(np.float32, (5, SIZE), elements=st.sampled_from([*ODD, 1.0, 1.5, 2.0]) | st.floats(-4, 4, width=32))
counts = arrays.arrays(np.int32, 5, elements=st.integers(0, 8))
ASKED = [
    SamplingParameters(temperature=0),
    SamplingParameters(temperature=0.7, top_k=1),
    SamplingParameters(temperature=0.6, top_k=4, top_p=0.9, seed=5),
    SamplingParameters(temperature=2.0, top_k=8, min_p=0.1, seed=9),
    SamplingParameters(temperature=1.0, top_k=9),
    SamplingParameters(temperature=1.0, top_p=0.8, seed=3),
    SamplingParameters(temperature=0.8, top_k=3, presence_penalty=0.5),
    SamplingParameters(temperature=0, repetition_penalty=1.5, logit_bias={4: 2.0}),
    SamplingParameters(temperature=0.7, top_p=0.9, min_p=0.01, frequency_penalty=0.5, repetition_penalty=1.2, seed=1),
]
NOTHING = np.empty(0, np.int64)


def requested(counts, named=None, temperatures=None):
    named = named or [NOTHING] * len(counts)
    return TopRequest(
        np.array(counts, np.int32),
        np.cumsum([0, *map(len, named)]),
        np.concatenate([NOTHING, *named]),
        np.array(temperatures if temperatures is not None else np.zeros(len(counts)), np.float64),
    )


@given(rows, counts)
def test_it_tells_the_likeliest_and_those_as_likely_or_the_row(logits, wanted):
    found = ToldRows().tell(torch.from_numpy(logits), requested(wanted))
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
    rows = ToldRows()
    found = rows.tell(logits, requested([1, 50, 0, 1, 7, 50]))
    assert found.whole.tolist() == [-1, -1, 0, -1, -1, -1]
    assert np.diff(found.starts).tolist() == [1, 50, 0, 1, 7, 50]
    np.testing.assert_array_equal(rows.whole(np.array([5, 1])), logits[[5, 1]].numpy())
    rows.forget()
    with pytest.raises(RuntimeError, match="no longer there"):
        rows.whole(np.array([5]))


@st.composite
def wishes(draw, vocabulary):
    """A row of what may be asked: parameters, tokens that were seen before, tokens that are masked, log-probabilities."""
    parameters = SamplingParameters(
        temperature=draw(st.sampled_from([0.0, 1e-5, 0.3, 0.8, 1.0, 3.0])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.5, 0.01])),
        top_k=draw(st.sampled_from([0, 0, 0, 1, 5, 20])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.05, 0.6])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.0, -2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.8])),
        logit_bias=draw(st.dictionaries(st.integers(0, vocabulary - 1), st.sampled_from([-100.0, -1.0, 3.0, 100.0]), max_size=3)),
        seed=draw(st.integers(0, 1000)),
    )
    tokens = st.lists(st.integers(0, vocabulary - 1), max_size=40)
    adjustment = Adjustment(parameters, draw(tokens), draw(tokens)) if Adjustment.needed(parameters) else None
    masked = draw(st.lists(st.integers(0, vocabulary - 1), max_size=3))
    return Row(parameters, draw(st.integers(0, 500)), adjustment, masked, draw(st.sampled_from([None, None, 0, 3])))


def choose(logits, row):
    """What is chosen from what is told of one row of logits; None: it does not decide."""
    request = requested([row.deciding], [row.named], [row.mass_temperature])
    found = ToldRows().tell(torch.from_numpy(logits[None]), request)
    if found.whole[0] >= 0:
        return None
    return Sampler(len(logits)).sample_told(StepTop(request, found).row(0), row)


def check_same(found, right):
    assert (found.token, found.error) == (right.token, right.error)
    assert (found.logprob is None) == (right.logprob is None)
    if right.logprob is not None:
        check_same_logprob(found.logprob, right.logprob)


def check_same_logprob(found, right):
    assert (found.rank, found.top_ids) == (right.rank, right.top_ids)
    assert found.logprob == pytest.approx(right.logprob, abs=1e-5)
    assert found.top_logprobs == pytest.approx(right.top_logprobs, abs=1e-5)


@given(arrays.arrays(np.float32, SIZE, elements=st.sampled_from(ODD) | st.floats(-4, 4, width=32)), wishes(SIZE))
def test_what_is_told_of_few_tokens_is_never_wrong(logits, row):
    found = choose(logits, row)
    if found is not None:
        (right,) = Sampler(SIZE).sample(logits[None].copy(), [row])
        check_same(found, right)


@pytest.mark.parametrize("deviation", [0.2, 1.5, 4.0, 12.0])
@given(seed=st.integers(0, 1000), row=wishes(4000))
def test_what_is_told_is_enough_to_draw_the_same(deviation, seed, row):
    logits = np.random.default_rng(seed).normal(0, deviation, 4000).astype(np.float32)
    found = choose(logits, row)
    if found is not None:
        (right,) = Sampler(4000).sample(logits[None].copy(), [row])
        check_same(found, right)


def test_of_what_models_tell_nearly_nothing_is_wanted_whole():
    """Logits spread as a trained model's are; the ways of asking that people use."""
    logits = np.random.default_rng(0).normal(0, 4.0, (300, 50_000)).astype(np.float32)
    usual = [
        SamplingParameters(temperature=0.7, top_p=0.8, repetition_penalty=1.05),
        SamplingParameters(temperature=0.8, top_p=0.95),
        SamplingParameters(temperature=0.6, top_p=0.9, presence_penalty=0.5),
    ]
    whole = 0
    for i, (row, parameters) in enumerate(zip(logits, usual * 100, strict=True)):
        adjustment = Adjustment(parameters, range(i, i + 500), range(40)) if Adjustment.needed(parameters) else None
        whole += choose(row, Row(parameters, i, adjustment)) is None
    assert whole < 30


@pytest.mark.parametrize("check", top.__all__)
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_it_conforms(check, dtype, tmp_path):
    def create(spec, config):
        return TorchModel(spec, replace(config, device="cpu"), most_top=30)

    (subject,) = subjects(replace(REGISTRATION, create=create), tmp_path, families=("qwen3",), dtype=dtype)
    CHECKS[check](subject)


def make_model(spec, most_top=256):
    config = DeviceConfig(kv_cache_bytes=1 << 20, device="cpu", dtype=DType.F32, threads=1)
    return TorchModel(spec, config, most_top=most_top)


def make_engine(model):
    return Engine(model, EngineConfig(vocabulary_size=320, context_length=512, max_batch_tokens=64, max_batch_size=16))


def answers(spec, most_top):
    """Tokens of sequences that are asked for in all these ways, their log-probabilities, and what the model told of rows."""
    model = make_model(spec, most_top)
    told, step_top = [], model.step_top
    model.step_top = lambda *asked: told.append(step_top(*asked)) or told[-1]
    engine, frames = make_engine(model), []
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
    logprobs = {(i, position): logprob for f in frames for i, position, logprob in f.logprobs}
    return tokens, [told for f in frames for told in f.prompt_logprobs], logprobs, told


def test_an_engine_draws_the_same_tokens_from_what_is_told(tmp_path):
    spec = read_model(write_checkpoint(tmp_path, CONFIGS["llama"]).folder, "m")
    (*right, logprobs, never), (*found, same, told) = answers(spec, 0), answers(spec, 256)
    assert found == right
    assert len(found[0]) == 12 * 2 * len(ASKED)
    assert len(logprobs) == 12
    assert same.keys() == logprobs.keys()
    for place, logprob in logprobs.items():
        check_same_logprob(same[place], logprob)
    assert not never
    assert sum((each.whole < 0).sum() for each in told) >= 0.9 * len(found[0])


def ask(engine, tokens):
    """Tokens of a sequence that the likeliest do not always decide, and how it ended."""
    frames = []
    parameters = SamplingParameters(temperature=2.0, seed=4)
    engine.submit(SequenceRequest(sequence_id=0, prompt=[1, 2, 3], max_tokens=tokens, sampling=parameters), frames.append)
    while not engine.idle:
        engine.step()
    return [token for frame in frames for token in frame.token_ids], [end for frame in frames for end in frame.finished]


def test_rows_that_what_is_told_does_not_decide_are_fetched(tmp_path):
    spec = read_model(write_checkpoint(tmp_path, CONFIGS["llama"]).folder, "m")
    model, fetched = make_model(spec), []
    rows_of_top = model.rows_of_top
    model.rows_of_top = lambda rows: fetched.append(rows.tolist()) or rows_of_top(rows)
    answers = [ask(make_engine(each), 40) for each in (make_model(spec, 0), model)]
    assert answers[0][0] == answers[1][0]
    assert 0 < len(fetched) < 40


def test_rows_that_can_not_be_fetched_cost_the_batch_and_twice_in_a_row_the_engine(tmp_path):
    model = make_model(read_model(write_checkpoint(tmp_path, CONFIGS["llama"]).folder, "m"))
    engine, step_top, rows_of_top = make_engine(model), model.step_top, model.rows_of_top

    def undecided(*asked):
        told = step_top(*asked)
        return replace(told, log_masses=told.log_masses + 99)

    def fail(_):
        raise MemoryError("no pinned memory")

    model.step_top, model.rows_of_top = undecided, fail
    (end,) = ask(engine, 5)[1]
    assert end.reason is Finish.FAILED
    assert "no pinned memory" in end.message
    model.rows_of_top = rows_of_top
    assert ask(engine, 5)[1][0].reason is Finish.LENGTH
    model.rows_of_top = fail
    ask(engine, 5)
    with pytest.raises(EngineDead, match="twice in a row"):
        ask(engine, 5)
    engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="finds the likeliest on a CUDA or ROCm device")
def test_a_device_tells_the_same():
    logits = torch.randn(64, 50_000, generator=torch.Generator().manual_seed(1)).bfloat16().float()  # with many that are equal
    counts, named = np.resize(np.array([1, 20, 0, 5]), 64), [NOTHING if i % 4 == 2 else np.array([i, 700]) for i in range(64)]
    request = requested(counts, named, np.full(64, 0.7))
    here, there = ToldRows().tell(logits, request), ToldRows().tell(logits.cuda(), request)
    for name in ("starts", "ids", "values", "named", "whole", "logits"):
        np.testing.assert_array_equal(getattr(here, name), getattr(there, name))
    np.testing.assert_allclose(here.log_masses, there.log_masses, rtol=0, atol=1e-5)
