"""Sequences that begin with copies of what others computed, since their backend lets none share a block."""

import random

import pytest
from fake_engine import VOCABULARY, Bench, CopyingModel, expected
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.backends.checkpoint import read_model
from penstock.backends.contract import DeviceConfig, DType, ModelLost
from penstock.backends.fake import BLOCK_SIZE
from penstock.backends.onnxruntime import REGISTRATION
from penstock.common.sources import resolve
from penstock.executor.sequence import Finish

SYSTEM = [3] * (2 * BLOCK_SIZE)


def conversation(bench, user, turns, system=SYSTEM, count=BLOCK_SIZE):
    """Turns of a user, each behind all before it; cached tokens and answers."""
    ids, told = list(system), []
    for turn in range(turns):
        ids += [(user * 31 + turn) % VOCABULARY] * BLOCK_SIZE
        number = 1000 * user + turn + len(bench.finished) * 100_000
        bench.submit(number, ids, count)
        ids += bench.run()[number]
        told.append((bench.started[number].cached_tokens, bench.tokens[number]))
    return told


@settings(deadline=None, max_examples=120)
@given(
    work=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 80), st.integers(1, 40)), min_size=1, max_size=12),
    blocks=st.integers(8, 60),
    chunk=st.integers(1, 70),
    batch=st.integers(1, 6),
    seed=st.none() | st.integers(0, 9),
    late=st.lists(st.integers(0, 6), min_size=12, max_size=12),
)
def test_answers_are_right_whatever_was_copied(work, blocks, chunk, batch, seed, late):
    drawn = random.Random(seed)
    model = CopyingModel(blocks, lambda found: 0 if seed is None else drawn.randint(0, found))
    bench = Bench(model=model, max_batch_tokens=chunk + batch, max_batch_size=batch, prefill_chunk=chunk)
    asked = {i: ([(7 * first + j * j) % VOCABULARY for j in range(length)], count) for i, (first, length, count) in enumerate(work)}
    for i, (prompt, count) in asked.items():
        for _ in range(late[i]):
            bench.engine.step()
        bench.submit(i, prompt, count)
    bench.run()
    assert bench.tokens == {i: expected(prompt, count) for i, (prompt, count) in asked.items()}
    assert bench.engine.blocks.counts().used == 0
    assert bench.engine.blocks.available == blocks


def test_every_turn_of_every_user_finds_all_before_it():
    bench = Bench(model=CopyingModel(64))
    first, second = (conversation(bench, user, 3) for user in (1, 2))
    assert [cached for cached, _ in first] == [0, 3 * BLOCK_SIZE, 5 * BLOCK_SIZE]
    assert [cached for cached, _ in second] == [2 * BLOCK_SIZE, 3 * BLOCK_SIZE, 5 * BLOCK_SIZE]


def test_a_copy_takes_no_more_than_there_is_room_for():
    bench = Bench(model=CopyingModel(10), max_batch_size=1, max_batch_tokens=64)
    prompt = list(range(6 * BLOCK_SIZE + 1))
    for number in (1, 2):
        bench.submit(number, prompt, 2)
        bench.run()
    assert bench.started[2].cached_tokens == 3 * BLOCK_SIZE  # 7 blocks of its own are needed beside those that it copies
    assert bench.tokens[2] == expected(prompt, 2)


def test_what_was_copied_is_found_as_long_as_one_of_the_copies_is_there():
    bench = Bench(model=CopyingModel(9), max_batch_size=1, max_batch_tokens=64)
    prompt = list(range(2 * BLOCK_SIZE + 1))
    for number in (1, 2):
        bench.submit(number, prompt, 1)
        bench.run()
    assert bench.started[2].cached_tokens == 2 * BLOCK_SIZE
    bench.submit(3, [5] * (7 * BLOCK_SIZE), 1)  # takes the blocks of one of them
    bench.run()
    bench.submit(4, prompt, 1)
    bench.run()
    assert bench.started[4].cached_tokens == 2 * BLOCK_SIZE


def test_what_is_gone_is_forgotten_and_what_is_computed_in_its_place_is_found():
    gone = [2]
    bench = Bench(model=CopyingModel(64, lambda found: gone.pop() if gone else 0))
    prompt = list(range(5 * BLOCK_SIZE + 1))
    cached = []
    for number in range(4):
        bench.submit(number, prompt, 2)
        bench.run()
        cached.append(bench.started[number].cached_tokens // BLOCK_SIZE)
    assert cached == [0, 3, 5, 5]
    assert bench.tokens[3] == expected(prompt, 2)


def test_a_prefix_that_can_not_be_copied_is_computed():
    def fail(_):
        raise ValueError("no such lane")

    bench = Bench(model=CopyingModel(64, fail))
    prompt = list(range(3 * BLOCK_SIZE))
    for number in (1, 2):
        bench.submit(number, prompt, 2)
        bench.run()
    assert bench.tokens[2] == expected(prompt, 2)
    assert bench.started[2].cached_tokens == 0


def test_a_step_copies_for_one_sequence_that_it_computes():
    bench = Bench(model=CopyingModel(64), max_batch_size=8)
    prompt = list(range(3 * BLOCK_SIZE))
    bench.submit(0, prompt, 1)
    bench.run()
    for number in (1, 2, 3):
        bench.submit(number, [*prompt, number], 4)
    bench.engine.step()
    assert len(bench.engine.planner.running) == 1
    assert bench.run() == {0: expected(prompt, 1)} | {i: expected([*prompt, i], 4) for i in (1, 2, 3)}


def test_a_model_that_is_lost_while_it_copies_ends_the_engine_and_all_hear_of_it():
    def lose(_):
        raise ModelLost("backend fake died in copy_prefix")

    bench = Bench(model=CopyingModel(64, lose))
    prompt = list(range(3 * BLOCK_SIZE))
    bench.submit(1, prompt, 2)
    bench.run()
    bench.engine.start()
    for number in (2, 3):
        bench.submit(number, prompt, 2)
    bench.engine.wait_until_idle()
    bench.engine.close()
    assert {bench.finished[number].reason for number in (2, 3)} == {Finish.FAILED}
    assert "died in copy_prefix" in bench.finished[2].message
    assert bench.engine.blocks.counts().used == 0


def test_a_cache_that_says_that_prefixes_are_copied_and_can_not_is_refused():
    class Unable(CopyingModel):
        copy_prefix = None

    with pytest.raises(TypeError, match="copy_prefix is not there"):
        Bench(model=Unable(8))


@pytest.fixture(scope="module")
def lanes():
    spec = read_model(resolve("builtin"), "builtin")
    decoder = spec.decoder
    blocks = 96 * 32 * 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * 4
    config = DeviceConfig(
        dtype=DType.F32, threads=1, kv_cache_bytes=blocks, max_batch_size=4, max_batch_tokens=128, max_context=512
    )
    model = REGISTRATION.create(spec, config)
    yield model
    model.close()


def of_lanes(model, **config):
    limits = {"max_batch_size": 4, "max_batch_tokens": 128, "prefill_chunk": 96, "context_length": 512}
    return Bench(model=model, vocabulary_size=model._vocabulary, **limits | config)


def test_lanes_are_copied_and_answers_are_what_they_were(lanes):
    size, system = lanes.kv.block_size, [1] + [40] * 79
    told = {}
    for caching in (False, True):
        bench = of_lanes(lanes, prefix_cache=caching)
        told[caching] = [conversation(bench, user, 3, system, size) for user in (1, 2, 1)]
    assert [[answer for _, answer in turns] for turns in told[True]] == [[answer for _, answer in turns] for turns in told[False]]
    assert [[cached for cached, _ in turns] for turns in told[False]] == 3 * [[0, 0, 0]]
    cached = [[cached // size for cached, _ in turns] for turns in told[True]]
    assert cached == [[0, 3, 5], [2, 3, 5], [2, 4, 5]]


def test_lanes_serve_many_that_begin_alike_at_once(lanes):
    prompts = [[1] + [40] * 79 + [50 + i] * (20 + 9 * i) for i in range(8)]
    told = []
    for caching in (False, True):
        bench = of_lanes(lanes, prefix_cache=caching)
        for i, prompt in enumerate(prompts):
            bench.submit(i, prompt, 24)
        told.append(bench.run())
    assert told[0] == told[1]
    assert sum(started.cached_tokens for started in bench.started.values()) == 7 * 2 * lanes.kv.block_size
