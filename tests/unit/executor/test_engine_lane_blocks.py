"""An engine over a cache in which a block is as long as the context: of each sequence one, and never another."""

import numpy as np
import pytest
from allocated_lanes import ON_DEVICE
from fake_engine import Bench
from joined_engines import JoinedBenches

from penstock.backends.checkpoint import read_model
from penstock.backends.contract import DeviceConfig, DType
from penstock.backends.onnxruntime import REGISTRATION
from penstock.common.sources import resolve

CONTEXT, LANES = 256, 6
LENGTHS = (1, 5, 31, 100, 33, 200, 64, 240)


@pytest.fixture(scope="module")
def models():
    spec = read_model(resolve("builtin"), "builtin")
    decoder = spec.decoder
    lanes = LANES * CONTEXT * 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * 4
    config = DeviceConfig(
        dtype=DType.F32, threads=1, kv_cache_bytes=lanes, max_batch_size=8, max_batch_tokens=128, max_context=CONTEXT
    )
    made = {name: each.create(spec, config) for name, each in (("device", ON_DEVICE), ("host", REGISTRATION))}
    assert (made["device"].kv.blocks, made["device"].kv.block_size) == (LANES, CONTEXT)
    yield made
    for model in made.values():
        model.close()


@pytest.fixture
def bench(models):
    def make(name):
        model = models[name]
        limits = {"max_batch_size": 8, "max_batch_tokens": 128, "prefill_chunk": 96, "context_length": CONTEXT}
        return Bench(model=model, vocabulary_size=model._vocabulary, prefix_cache=False, **limits)

    return make


def submit_all(bench):
    for i, length in enumerate(LENGTHS):
        bench.submit(i, np.random.default_rng(i).integers(0, 250, length).tolist(), 12)


def test_more_sequences_than_lanes_take_their_turns(bench):
    device, host = bench("device"), bench("host")
    for each in (device, host):
        submit_all(each)
    assert device.run() == host.run()
    assert all(len(tokens) == 12 for tokens in device.tokens.values())


@pytest.mark.parametrize(("prefill", "decode"), [("device", "host"), ("host", "device")])
def test_kv_goes_to_caches_of_short_blocks_and_comes_from_them(bench, prefill, decode):
    host, joined = bench("host"), JoinedBenches(bench(prefill), bench(decode))
    submit_all(host)
    right = host.run()
    submit_all(joined)
    assert joined.run() == right
    assert joined.arrived.keys() == set(range(len(LENGTHS)))
