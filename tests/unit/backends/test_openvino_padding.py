"""Steps in OpenVINO that are made longer: to a number that divides well, and with the same answers and cache."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.conformance.driver import Driver, Piece
from penstock.backends.contract import DeviceConfig, DType
from penstock.backends.openvino import REGISTRATION
from penstock.backends.openvino.cache import BLOCK_SIZE
from penstock.backends.openvino.padding import LONGEST, pad, quick_count


@given(st.integers(1, 5000))
def test_a_step_becomes_longer_by_less_than_a_block_and_a_seventh(tokens):
    more = quick_count(tokens) - tokens
    assert 0 <= more < LONGEST <= BLOCK_SIZE
    assert more <= tokens / 7
    assert quick_count(tokens + more) == tokens + more


@pytest.mark.parametrize("tokens", [497, 498, 511, 1016, 2008, 2032])
def test_no_step_has_few_divisors_but_small_ones(tokens):
    assert quick_count(tokens) % 16 == 0


@pytest.fixture
def model(without_bf16, tmp_path):
    spec = write_checkpoint(tmp_path, CONFIGS["qwen3"])
    made = REGISTRATION.create(spec, DeviceConfig(dtype=DType.INT8, kv_cache_bytes=1 << 22, threads=1, max_batch_tokens=512))
    yield made
    made.close()


def answers(model, monkeypatch, *, padded):
    """Logits and KV of prompts beside a decode, in a step of 139 tokens."""
    given = []
    monkeypatch.setattr("penstock.backends.openvino.model.pad", pad_and_note(given) if padded else lambda batch, _: batch)
    ids, driver = np.random.default_rng(0).integers(0, 320, 200).tolist(), Driver(model)
    first, _ = driver.prefill(ids[:61])
    others = [driver.sequence(), driver.sequence()]
    pieces = [Piece(first, [7]), Piece(others[0], ids[:40]), Piece(others[1], ids[100:198])]
    logits = driver.step(*pieces)
    kv = [model.export_kv(s.blocks, range(s.length)).data for s in (first, *others)]
    return logits, kv, [len(batch.token_ids) for batch in given]


def pad_and_note(given):
    def noted(batch, block):
        given.append(pad(batch, block))
        return given[-1]

    return noted


def test_what_a_step_is_padded_with_changes_no_answer_and_no_cache(model, monkeypatch):
    plain, kv, _ = answers(model, monkeypatch, padded=False)
    found, padded_kv, lengths = answers(model, monkeypatch, padded=True)
    assert lengths == [61, 144]
    for one, other in zip((*found, *padded_kv), (*plain, *kv), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-3 * np.abs(other).max())


def test_blocks_that_others_may_name_are_none_of_the_padding(model):
    with pytest.raises(ValueError, match=f"block ids go from 0 to {model.kv.blocks - 1}"):
        model.export_kv([model.kv.blocks], range(1))
