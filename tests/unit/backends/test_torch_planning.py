"""How the torch backend lays a step out, against attention written with nothing but a loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.backends.contract import StepBatch
from penstock.backends.pytorch.attention.paged import Paged
from penstock.backends.pytorch.attention.plan import Attention
from penstock.backends.pytorch.attention.planning import group_by_width, plan_attention
from penstock.backends.pytorch.attention.sdpa import GatheredDecoding, SdpaPrefilling
from penstock.backends.pytorch.attention.selection import ON_PROCESSOR

BLOCK, BLOCKS, KV_HEADS, HEADS, DIM = 4, 64, 2, 6, 8


def batch_of(pieces, random):
    """A step of (past, new) pieces, each in blocks of its own that lie anywhere."""
    counts = [-(-(past + new) // BLOCK) for past, new in pieces]
    new = [new for _, new in pieces]
    return StepBatch(
        token_ids=np.zeros(sum(new), np.int64),
        positions=np.concatenate([np.arange(past, past + count) for past, count in pieces]),
        past_lengths=np.array([past for past, _ in pieces], np.int32),
        starts=np.cumsum([0, *new]).astype(np.int32),
        block_ids=random.permutation(BLOCKS)[: sum(counts)].astype(np.int32),
        block_starts=np.cumsum([0, *counts]).astype(np.int32),
        logits_rows=np.empty(0, np.int64),
    )


def looped(batch, queries, keys, values, cache, window):
    """Attention of each token on its own; `cache` is written to."""
    out = torch.empty_like(queries)
    for s in range(len(batch.past_lengths)):
        blocks = batch.block_ids[batch.block_starts[s] : batch.block_starts[s + 1]]
        for row in range(batch.starts[s], batch.starts[s + 1]):
            at = int(batch.positions[row])
            cache[0, blocks[at // BLOCK], at % BLOCK], cache[1, blocks[at // BLOCK], at % BLOCK] = keys[row], values[row]
            seen = range(0 if window is None else max(0, at - window + 1), at + 1)
            k, v = (torch.stack([cache[kind, blocks[t // BLOCK], t % BLOCK] for t in seen]) for kind in (0, 1))
            for head in range(HEADS):
                own = head // (HEADS // KV_HEADS)
                weights = (k[:, own] @ queries[row, head] / DIM**0.5).softmax(0)
                out[row, head] = weights @ v[:, own]
    return out


pieces = st.lists(st.tuples(st.integers(0, 19), st.sampled_from([1, 1, 1, 2, 5, 9])), min_size=1, max_size=7)


windows = st.sampled_from([None, 1, 3, 6])


@pytest.mark.parametrize("prefilling", [SdpaPrefilling.masked, SdpaPrefilling.repeated, SdpaPrefilling.lower_right])
@settings(deadline=None, max_examples=40)  # the first example waits for PyTorch to set itself up
@given(pieces, windows, st.integers(0, 100))
def test_any_step_is_attended_as_by_a_loop(prefilling, pieces, window, seed):
    check_step(Attention(GatheredDecoding, prefilling, ("gathered", "")), pieces, window, seed)


@settings(deadline=None, max_examples=8)  # Triton's interpreter takes its time
@given(pieces, windows, st.integers(0, 100))
def test_triton_attends_to_any_step_as_a_loop(pieces, window, seed):
    paged = Paged(window, processors=8)
    check_step(Attention(paged.decoding, paged.prefilling, ("paged", "paged")), pieces, window, seed)


@torch.inference_mode()
def check_step(attention, pieces, window, seed):
    batch = batch_of(pieces, np.random.default_rng(seed))
    torch.manual_seed(seed)
    tokens = len(batch.token_ids)
    queries, keys, values = (torch.randn(tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    cache = torch.randn(2, BLOCKS, BLOCK, KV_HEADS, DIM)
    expected_cache = cache.clone()
    expected = looped(batch, queries, keys, values, expected_cache, window)
    found = plan_attention(batch, BLOCK, window, torch.device("cpu"), attention).attend(queries, keys, values, cache)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(cache, expected_cache)


@given(st.lists(st.integers(1, 500), max_size=40))
def test_padding_at_most_doubles_what_is_read(widths):
    groups = group_by_width(dict(enumerate(widths)))
    assert sorted(s for group in groups for s in group) == list(range(len(widths)))
    for group in groups:
        own = [widths[s] for s in group]
        assert max(own) * len(own) < 2 * sum(own) + len(own)


def test_a_long_context_does_not_pad_the_short_ones():
    assert group_by_width({3: 400, 5: 2, 8: 2, 9: 1}) == [[9], [5, 8], [3]]


@pytest.mark.parametrize("window", [None, 5])
def test_blocks_older_than_the_window_are_not_read(window):
    batch = batch_of([(30, 1)], np.random.default_rng(0))
    (group,) = plan_attention(batch, BLOCK, window, torch.device("cpu"), ON_PROCESSOR).decodes
    assert group.table.shape[1] == (8 if window is None else 2)
