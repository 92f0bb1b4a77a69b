"""A real model in two engines, of which one prefills what the other decodes, against the same model in one engine."""

from dataclasses import replace

import numpy as np
import pytest
from fake_engine import GREEDY, Bench
from joined_engines import JoinedBenches

from penstock.executor.config import ExecutorConfig
from penstock.executor.loading import load
from penstock.executor.sampling import SamplingParameters
from penstock.executor.sequence import Finish

SETTINGS = ExecutorConfig(
    model="builtin",
    dtype="f32",
    calibration_seconds=0,
    kv_cache_gib=0.02,
    max_batch_size=8,
    max_batch_tokens=128,
    threads=1,
    weight_cache=False,
)
LENGTHS = (1, 5, 31, 32, 33, 200, 700)


@pytest.fixture(scope="module")
def loaded():
    """The model in a backend, as often as need be: (backend, number) names one."""
    held = {}

    def get(backend, number=0):
        if (backend, number) not in held:
            held[backend, number] = load(replace(SETTINGS, backend=backend))
        return held[backend, number]

    yield get
    for each in held.values():
        each.engine.close()


@pytest.fixture
def benches(loaded):
    """Makes an engine with an empty cache over the first or the second model of a backend."""
    limits = {"max_batch_size": 8, "max_batch_tokens": 128, "prefill_chunk": 96, "context_length": 1024}

    def make(number, backend="openvino"):
        one = loaded(backend, number)
        able = {"vocabulary_size": one.spec.decoder.vocabulary_size, "prefix_cache": one.capabilities.prefix_cache}
        return Bench(model=one.model, **able, **limits)

    return make


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, 250, length).tolist()


def check_same(told, expected):
    """Logits differ in their last bits with what is computed beside them."""
    assert told.keys() == expected.keys()
    for place, of_one in expected.items():
        for a, b in zip(*((x if isinstance(x, list) else [x]) for x in (told[place], of_one)), strict=True):
            assert (a.rank, a.top_ids) == (b.rank, b.top_ids)
            assert np.allclose([a.logprob, *a.top_logprobs], [b.logprob, *b.top_logprobs], atol=1e-4)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("count", [1, 2, 12])
def test_prompts_of_every_length_go_on_as_in_one_engine(benches, count, native):
    whole, joined = benches(1), JoinedBenches(benches(0), benches(1), native=native)
    for i, length in enumerate(LENGTHS):
        whole.submit(i, prompt_of(length, i), count, logprobs=2)
    told, logprobs = whole.run(), whole.logprobs
    for i, length in enumerate(LENGTHS):
        joined.submit(i, prompt_of(length, i), count, logprobs=2)
    assert joined.run() == told
    check_same(joined.logprobs, logprobs)
    assert (joined.arrived.keys() == set(range(len(LENGTHS)))) is (count > 1)
    if count > 1:
        assert joined.arrived[5].pushes > 1
        kv = joined.decode.model.kv
        size = kv.bytes_per_block // kv.block_size  # of a token; whole blocks where they go as they are
        tokens = [-(-n // kv.block_size) * kv.block_size if native else n for n in LENGTHS]
        assert [joined.arrived[i].kv_bytes for i in range(len(LENGTHS))] == [n * size for n in tokens]


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling": SamplingParameters(temperature=1.5, seed=5, top_p=0.9), "logprobs": 2, "prompt_logprobs": 1},
        {"sampling": SamplingParameters(temperature=0.7, seed=6, repetition_penalty=1.3, frequency_penalty=0.5), "logprobs": 0},
        {"sampling": GREEDY, "stop_ids": range(100), "min_tokens": 6},
        {"sampling": GREEDY, "replayed": prompt_of(9, 2)},
    ],
    ids=["prompt's log-probabilities", "penalties", "min_tokens", "replayed"],
)
def test_what_is_asked_of_a_sequence_holds(benches, fields):
    whole, joined = benches(1), JoinedBenches(benches(0), benches(1))
    whole.submit(1, prompt_of(150), 24, **fields)
    told, finish = whole.run(), whole.finished[1].reason
    joined.submit(1, prompt_of(150), 24, **fields)
    assert joined.run() == told
    check_same(joined.logprobs, whole.logprobs)
    assert joined.decode.finished[1].reason is finish
    assert joined.prefill.finished[1].reason is Finish.HANDED_OFF


def test_choices_share_a_prefix_that_came_from_elsewhere(benches):
    whole, joined = benches(1), JoinedBenches(benches(0), benches(1))
    prompt, sampling = prompt_of(150), SamplingParameters(temperature=1.0, seed=1)
    for i in range(4):
        whole.submit(i, prompt, 10, sampling=replace(sampling, seed=i))
    told = whole.run()
    joined.submit(0, prompt, 10, sampling=replace(sampling, seed=0), request_id="r")
    for i in range(1, 4):
        joined.submit_together(i, prompt, 10, sampling=replace(sampling, seed=i), request_id="r")
    assert joined.run() == told
    assert [joined.decode.started[i].cached_tokens for i in (1, 2, 3)] == [128] * 3


@pytest.mark.parametrize(("prefill", "decode"), [("torch", "openvino"), ("openvino", "onnxruntime"), ("onnxruntime", "torch")])
def test_what_one_backend_prefills_another_decodes(benches, prefill, decode):
    whole, joined = benches(0), JoinedBenches(benches(0, prefill), benches(0, decode))
    for i, length in enumerate(LENGTHS):
        whole.submit(i, prompt_of(length, i), 12, logprobs=2)
        joined.submit(i, prompt_of(length, i), 12, logprobs=2)
    assert joined.run() == whole.run()
    check_same(joined.logprobs, whole.logprobs)
    assert joined.arrived.keys() == set(range(len(LENGTHS)))
