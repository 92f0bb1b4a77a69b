"""What does not fit into memory is refused before it is read, with what would fit."""

import pytest

from penstock.backends.architectures.families import read_decoder
from penstock.backends.conformance.checkpoints import CONFIGS
from penstock.backends.contract import Capabilities, DeviceConfig, DType
from penstock.backends.memory_need import check_memory, kv_bytes, weight_bytes
from penstock.common.service import StartError

DECODER = read_decoder(CONFIGS["llama"])
CAN = Capabilities(dtypes=(DType.BF16, DType.INT8, DType.INT4))


def refusal(free, **config):
    with pytest.raises(StartError) as raised:
        check_memory("mine", DECODER, CAN, DeviceConfig(**config), free)
    return str(raised.value)


def test_weights_are_counted_as_a_checkpoint_holds_them():
    elements = sum(a * b for a, b in (s for s in DECODER.weight_shapes().values() if len(s) == 2))
    vectors = sum(s[0] for s in DECODER.weight_shapes().values() if len(s) == 1)
    assert weight_bytes(DECODER, CAN, DType.BF16) == 2 * (elements + vectors)
    assert weight_bytes(DECODER, CAN, DType.INT4) == elements // 2 + 2 * vectors


def test_what_a_backend_says_of_its_weights_counts():
    assert weight_bytes(DECODER, Capabilities(dtypes=(DType.F32,), weight_bytes={DType.F32: 7}), DType.F32) == 7


def test_what_fits_is_not_refused():
    least = weight_bytes(DECODER, CAN, DType.BF16) + kv_bytes(DECODER, DType.BF16, 256)
    check_memory("mine", DECODER, CAN, DeviceConfig(), least)
    assert "not enough memory: mine needs" in refusal(least - 1)


def test_the_dtypes_that_would_fit_are_named():
    free = weight_bytes(DECODER, CAN, DType.INT8) + kv_bytes(DECODER, DType.INT8, 256)
    told = refusal(free, dtype=DType.BF16)
    assert "what would fit: --dtype int8 (" in told
    assert "--dtype int4 (" in told
    assert "no dtype of this backend fits (bf16, int8, int4)" in refusal(1000)


def test_a_cache_that_is_too_large_is_told_with_one_that_fits():
    told = refusal(1 << 30, kv_cache_bytes=2 << 30)
    assert "a KV cache of 2.00 GiB" in told
    assert "--kv-cache-gib 0.99 with bf16" in told
