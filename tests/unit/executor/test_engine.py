"""What the engine promises, with a backend whose tokens tell every mistake in paging."""

import itertools
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
from fake_engine import GREEDY, VOCABULARY, Bench, expected
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.backends.fake import BLOCK_SIZE
from penstock.common.step_times import Curve, StepTimes
from penstock.executor.engine import EngineConfig
from penstock.executor.sampling import SamplingParameters
from penstock.executor.sequence import Finish, Frame

# Prompts of few different tokens, so that prefixes are often shared.
prompts = st.lists(
    st.tuples(st.sampled_from([0, 1]), st.integers(1, 80), st.integers(1, 40), st.sampled_from([b"", b"salt"])),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=120)
@given(
    work=prompts,
    blocks=st.integers(8, 60),
    chunk=st.integers(1, 70),
    batch=st.integers(1, 6),
    caching=st.booleans(),
    late=st.lists(st.integers(0, 6), min_size=12, max_size=12),
)
def test_answers_do_not_depend_on_batch_chunks_cache_or_preemption(work, blocks, chunk, batch, caching, late):
    bench = Bench(blocks, max_batch_tokens=chunk + batch, max_batch_size=batch, prefill_chunk=chunk, prefix_cache=caching)
    asked = {
        i: ([(7 * first + j * j) % VOCABULARY for j in range(length)], count) for i, (first, length, count, _) in enumerate(work)
    }
    for i, (prompt, count) in asked.items():
        for _ in range(late[i]):
            bench.engine.step()
        bench.submit(i, prompt, count, salt=work[i][3])
    bench.run()
    for i, (prompt, count) in asked.items():
        assert bench.tokens[i] == expected(prompt, count)
        assert bench.finished[i].reason is Finish.LENGTH
    assert bench.engine.blocks.counts().used == 0
    assert bench.engine.blocks.available == blocks


@settings(deadline=None, max_examples=60)
@given(
    temperature=st.sampled_from([0.0, 0.9, 5.0]),
    penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 2**64 - 1),
    cut=st.integers(1, 19),
    beside=st.integers(0, 3),
)
def test_a_replay_goes_on_with_the_same_tokens(temperature, penalty, seed, cut, beside):
    sampling = SamplingParameters(temperature=temperature, repetition_penalty=penalty, frequency_penalty=penalty - 1, seed=seed)
    whole = Bench()
    whole.submit(1, [3, 4, 5], 20, sampling=sampling)
    tokens = whole.run()[1]
    again = Bench()
    for i in range(beside):
        again.submit(10 + i, [i] * 20, 30)
    again.submit(1, [3, 4, 5], 20, sampling=sampling, replayed=tokens[:cut])
    assert tokens[:cut] + again.run()[1] == tokens
    positions = [p for frame in again.frames for i, p in zip(frame.sequence_ids, frame.positions, strict=True) if i == 1]
    assert positions == list(range(cut, 20))


def test_preemption_takes_the_lowest_priority_and_its_answer_stays_right():
    bench = Bench(blocks=8)
    bench.submit(1, [1] * 40, 60, priority=0)
    bench.submit(2, [2] * 40, 60, priority=5)
    bench.run()
    assert bench.tokens == {1: expected([1] * 40, 60), 2: expected([2] * 40, 60)}
    assert bench.finished[1].preemptions > 0
    assert bench.finished[2].preemptions == 0


def test_a_cached_prompt_computes_its_last_block_alone():
    bench = Bench()
    prompt = list(range(96))
    for i in (1, 2):
        bench.submit(i, prompt, 5)
        bench.run()
    assert bench.started[1].cached_tokens == 0
    assert bench.started[2].cached_tokens == 96 - BLOCK_SIZE
    assert bench.tokens[1] == bench.tokens[2]


def test_the_next_turn_of_a_conversation_finds_the_answer_in_the_cache():
    bench = Bench()
    bench.submit(1, [5] * 16, 33)
    answer = bench.run()[1]
    turn = [5] * 16 + answer + [7] * 10
    bench.submit(2, turn, 3)
    bench.run()
    assert bench.started[2].cached_tokens == 48
    assert bench.tokens[2] == expected(turn, 3)


def test_choices_that_arrive_together_compute_their_prompt_once():
    bench = Bench()
    prompt = list(range(97)) * 4
    for i in range(5):
        bench.submit(i, prompt, 5, sampling=SamplingParameters(seed=i))
    bench.submit(9, [1] * 20, 5)
    bench.engine.step()
    assert bench.started.keys() == {0, 9}
    bench.run()
    assert [bench.started[i].cached_tokens for i in range(5)] == [0] + 4 * [384]
    bench = Bench(blocks=40, max_batch_tokens=64, prefill_chunk=32, max_batch_size=8)
    for i in range(5):
        bench.submit(i, prompt, 40)
    assert bench.run() == {i: expected(prompt, 40) for i in range(5)}


def test_a_prompt_that_waits_for_a_prefix_goes_on_when_its_computer_is_aborted():
    bench = Bench(max_batch_tokens=64, prefill_chunk=32, max_batch_size=8)
    for i in (1, 2):
        bench.submit(i, [1] * 300, 5)
    bench.engine.step()
    bench.engine.abort([1], bench.sink)
    assert bench.run() == {2: expected([1] * 300, 5)}
    assert bench.started[2].cached_tokens == 64


def test_another_salt_finds_nothing():
    bench = Bench()
    for i, salt in enumerate((b"a", b"b")):
        bench.submit(i, [5] * 64, 2, salt=salt)
        bench.run()
    assert bench.started[1].cached_tokens == 0


def test_decodes_go_on_beside_a_long_prompt_and_prompts_beside_many_decodes():
    bench = Bench(max_batch_tokens=24, max_batch_size=8, prefill_chunk=16)
    for i in range(7):
        bench.submit(i, [i], 100)
    bench.engine.step()
    bench.submit(9, [1] * 200, 1)
    before = len(bench.tokens[0])
    steps = 0
    while 9 not in bench.tokens:
        bench.engine.step()
        steps += 1
    assert len(bench.tokens[0]) - before == steps
    assert steps == -(-200 // 16)


def test_higher_priority_starts_first_and_equal_ones_by_arrival():
    bench = Bench(max_batch_size=1, max_batch_tokens=64)
    for i, priority in enumerate([0, 5, 5, -1]):
        bench.submit(i, [i], 2, priority=priority)
    bench.run()
    assert list(bench.finished) == [1, 2, 0, 3]


def test_priority_takes_no_turn_of_another_tenant():
    bench = Bench(max_batch_size=1, max_batch_tokens=64)
    asked = [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("a", 100), ("b", -1), ("a", 100)]
    for i, (tenant, priority) in enumerate(asked):
        bench.submit(i, [i], 2, tenant=tenant, priority=priority)
    bench.run()
    assert list(bench.finished) == [4, 1, 6, 3, 0, 5, 2]


def test_preemption_takes_the_last_turn_whatever_priority_another_tenant_gives_itself():
    bench = Bench(blocks=8)
    bench.submit(1, [1] * 40, 60, tenant="a")
    bench.submit(2, [2] * 40, 60, tenant="b", priority=100)
    bench.run()
    assert bench.tokens == {1: expected([1] * 40, 60), 2: expected([2] * 40, 60)}
    assert bench.finished[1].preemptions == 0
    assert bench.finished[2].preemptions > 0


def test_running_sequence_gives_way_to_one_of_its_tenant_with_a_higher_priority():
    bench = Bench(blocks=8)
    bench.submit(1, [1] * 40, 60, tenant="a")
    bench.engine.step()
    bench.submit(2, [2] * 40, 60, tenant="a", priority=1)
    bench.run()
    assert bench.tokens == {1: expected([1] * 40, 60), 2: expected([2] * 40, 60)}
    assert (bench.finished[1].preemptions > 0, bench.finished[2].preemptions) == (True, 0)
    assert not bench.engine.planner._turns._tenants


def test_an_abort_and_a_deadline_free_their_blocks_within_a_step():
    bench = Bench()
    bench.submit(1, [1] * 50, 900)
    bench.submit(2, [2] * 50, 900, deadline=time.monotonic() + 3600)
    bench.submit(3, [3] * 50, 900, deadline=time.monotonic() - 1)
    bench.engine.step()
    assert bench.finished[3].reason is Finish.DEADLINE
    assert 3 not in bench.tokens
    bench.engine.abort([1, 77], bench.sink)
    bench.engine.planner.deadlines._heap[0] = (0.0, *bench.engine.planner.deadlines._heap[0][1:])
    bench.engine.step()
    assert {i: f.reason for i, f in bench.finished.items()} == {3: Finish.DEADLINE, 2: Finish.DEADLINE}
    assert bench.engine.idle
    assert bench.engine.blocks.counts().used == 0


def test_waiting_sequences_can_be_aborted_and_expire_too():
    bench = Bench(max_batch_size=1, max_batch_tokens=64)
    bench.submit(1, [1], 3)
    bench.submit(2, [2], 3)
    bench.submit(3, [3], 3, deadline=time.monotonic())
    bench.engine.abort([2], bench.sink)
    bench.run()
    assert {i: f.reason for i, f in bench.finished.items()} == {1: Finish.LENGTH, 3: Finish.DEADLINE}


def test_sequences_that_ended_before_their_deadline_are_not_kept():
    bench = Bench()
    for i in range(500):
        bench.submit(i, [1], 1, deadline=time.monotonic() + 3600)
        bench.run()
    assert len(bench.engine.planner.deadlines._heap) < 100


def test_the_end_of_one_sink_leaves_the_others():
    bench, heard = Bench(), []
    bench.submit(1, [1], 30)
    other = Bench()
    bench.engine.submit(request_of(other, 1), heard.append)
    bench.engine.step()
    bench.engine.abort_all(heard.append)  # another bound method of the same list: the same sink
    bench.run()
    assert bench.tokens[1] == expected([1], 30)
    assert len(heard) == 1


def request_of(bench, sequence_id):
    taken = []
    bench.engine.submit, real = lambda request, sink: taken.append(request), bench.engine.submit
    bench.submit(sequence_id, [2], 30)
    bench.engine.submit = real
    return taken[0]


def test_stop_tokens_end_a_sequence_but_not_before_min_tokens():
    answer = expected([9], 12)
    bench = Bench()
    bench.submit(1, [9], 12, stop_ids=[answer[4]])
    bench.submit(2, [9], 12, stop_ids=[answer[0], 10**6], min_tokens=3)
    bench.run()
    assert bench.tokens[1] == answer[: answer.index(answer[4]) + 1]
    assert bench.finished[1].reason is Finish.STOP
    assert answer[0] not in bench.tokens[2][:3]


@pytest.mark.parametrize(
    ("fields", "reason", "told"),
    [
        ({"max_tokens": 1023}, Finish.REFUSED, "1024 that fit"),
        ({"prompt": []}, Finish.FAILED, "empty"),
        ({"prompt": [VOCABULARY]}, Finish.FAILED, str(VOCABULARY)),
        ({"sampling": SamplingParameters(logit_bias={VOCABULARY: 1.0})}, Finish.FAILED, str(VOCABULARY)),
        ({"sampling": SamplingParameters(temperature=float("nan"))}, Finish.FAILED, "temperature"),
        ({"sampling": SamplingParameters(temperature=float("inf"))}, Finish.FAILED, "temperature"),
        ({"sampling": SamplingParameters(min_p=float("nan"))}, Finish.FAILED, "min_p"),
        ({"replayed": [1, 2, 3, 4]}, Finish.FAILED, "replayed"),
    ],
)
def test_what_can_not_run_is_told_at_once_and_harms_nobody(fields, reason, told):
    bench = Bench()
    bench.submit(1, [1], 5)
    bench.submit(2, **{"prompt": [1, 2], "max_tokens": 4} | fields)
    assert bench.finished[2].reason is reason
    assert told in bench.finished[2].message
    assert bench.run()[1] == expected([1], 5)


def test_what_the_cache_can_never_hold_is_refused():
    bench = Bench(blocks=4)
    bench.submit(1, [1] * 60, 5)
    assert bench.finished[1].reason is Finish.REFUSED
    bench.submit(2, [1] * 60, 4)
    assert bench.run()[2] == expected([1] * 60, 4)


def test_an_engine_in_its_thread_answers_and_sleeps_until_there_is_work():
    bench, done = Bench(), threading.Event()

    def sink(frame):
        bench.sink(frame)
        done.set() if frame.finished else None

    bench.engine.start()
    try:
        for _ in range(2):
            done.clear()
            bench.finished.clear()
            bench.tokens.clear()
            bench.engine.submit(request_of(Bench(), 1), sink)
            assert done.wait(10)
            assert bench.tokens[1] == expected([2], 30)
            bench.engine.wait_until_idle()
            steps = bench.engine.meter.steps
        assert steps == 60
    finally:
        bench.engine.close()
    bench.engine.close()
    late: list[Frame] = []
    bench.engine.submit(request_of(Bench(), 1), late.append)
    assert late[0].finished[0].reason is Finish.REFUSED


@pytest.mark.parametrize("place", ["beginning", "coming"])
def test_who_waits_for_an_idle_engine_waits_for_a_sequence_between_two_of_its_places(place, monkeypatch):
    bench, inside, release, moved = Bench(), threading.Event(), threading.Event(), threading.Event()
    engine, planner, asked = bench.engine, bench.engine.planner, []

    def held(work, *given):
        """The engine is held here, in its first step."""
        inside.set()
        assert release.wait(10)
        return work(*given)

    def wait_for(predicate, timeout=None, waits=engine._changed.wait_for):
        if threading.current_thread() is threading.main_thread():
            asked.append(predicate())
            release.set()
        return waits(predicate, timeout)

    look = type(planner).empty.fget

    def looked_at(planner):
        """Told to another thread, which the engine overtakes: the sequence has come, and its command is done."""
        empty = look(planner)
        if threading.current_thread() is threading.main_thread() and not release.is_set():
            release.set()
            assert moved.wait(10)
        return empty

    if place == "beginning":  # it waits no longer, and does not run yet
        monkeypatch.setattr(planner, "_begin", partial(held, planner._begin))
    else:
        monkeypatch.setattr(engine._runner, "watch", partial(held, engine._runner.watch))
        monkeypatch.setattr(planner, "plan", lambda plan=planner.plan: (moved.set(), plan())[1])
        monkeypatch.setattr(type(planner), "empty", property(looked_at))
    monkeypatch.setattr(engine._changed, "wait_for", wait_for)
    bench.submit(1, [2], 30)
    engine.start()
    try:
        assert inside.wait(10)
        engine.wait_until_idle()
        assert asked == [False]
        assert bench.tokens[1] == expected([2], 30)
    finally:
        release.set()
        engine.close()


def test_a_sequence_that_is_looked_at_before_a_drain_and_comes_behind_it_is_refused(monkeypatch):
    bench, looks = Bench(), []

    def looked_at(request, look=bench.engine._refusal):
        looks.append(look(request))
        if len(looks) == 1:
            bench.engine.drain()
            bench.engine.wait_until_idle()
        return looks[-1]

    monkeypatch.setattr(bench.engine, "_refusal", looked_at)
    bench.submit(1, [2], 30)
    assert looks == ["", "the executor is draining"]
    assert bench.finished[1].reason is Finish.REFUSED
    assert bench.engine.idle


def test_a_batch_that_leaves_prompts_no_room_is_refused():
    with pytest.raises(ValueError, match="max_batch_tokens"):
        EngineConfig(vocabulary_size=1, context_length=1, max_batch_tokens=8, max_batch_size=8)


def test_prompt_logprobs_are_the_same_in_chunks_and_after_preemption():
    def told(**config):
        bench = Bench(**config)
        bench.submit(1, [1] * 40, 40, priority=0, prompt_logprobs=2)
        bench.submit(2, [2] * 40, 60, priority=5, sampling=GREEDY)
        bench.run()
        (of_prompt,) = [entry for frame in bench.frames for entry in frame.prompt_logprobs]
        return of_prompt

    whole = told()
    assert len(whole[1]) == 39
    assert told(max_batch_tokens=8, max_batch_size=2, prefill_chunk=3) == whole
    assert told(blocks=7) == whole


class Spoilt:
    """Has the fake model give NaN for the prompt that holds one token."""

    def __init__(self, bench, token):
        self._step, self._token = bench.model.step, token
        bench.model.step = self.step

    def step(self, batch):
        output = self._step(batch)
        for first, end in itertools.pairwise(batch.starts.tolist()):
            if end - first > 1 and self._token in batch.token_ids[first:end]:
                output.logits[(batch.logits_rows >= first) & (batch.logits_rows < end)] = np.nan
        return output


@pytest.mark.parametrize("fields", [{}, {"sampling": SamplingParameters()}, {"logprobs": 3}, {"prompt_logprobs": 3}], ids=repr)
def test_a_model_that_gives_nan_costs_that_sequence_alone(fields):
    bench = Bench()
    Spoilt(bench, 90)
    bench.submit(1, [1, 2, 3], 20)
    bench.submit(2, [4, 90, 5], 20, **fields)
    bench.submit(3, [6, 7, 8], 20)
    bench.run()
    assert bench.finished[2].reason is Finish.FAILED
    assert "not finite" in bench.finished[2].message
    assert 2 not in bench.tokens
    assert (bench.tokens[1], bench.tokens[3]) == (expected([1, 2, 3], 20), expected([6, 7, 8], 20))
    assert bench.engine.blocks.counts().used == 0


@pytest.mark.parametrize("fields", [{}, {"prompt_logprobs": 3}], ids=repr)
def test_nobody_begins_with_what_gave_nan(fields):
    bench = Bench()
    begin = list(range(2 * BLOCK_SIZE))
    bench.submit(1, [*begin, 1], 4)
    bench.submit(2, [90] * 2 * BLOCK_SIZE, 4)
    bench.run()
    assert bench.engine.blocks.counts().cached == 4
    Spoilt(bench, 89)
    bench.submit(3, [*begin, 89, 2], 4, **fields)
    bench.run()
    assert bench.finished[3].reason is Finish.FAILED
    assert bench.engine.blocks.counts().cached == 2
    for i, prompt in ((4, [*begin, 1]), (5, [90] * 2 * BLOCK_SIZE + [1])):
        bench.submit(i, prompt, 4)
        bench.run()
        assert bench.tokens[i] == expected(prompt, 4)
    assert (bench.started[4].cached_tokens, bench.started[5].cached_tokens) == (0, 2 * BLOCK_SIZE)


@pytest.mark.parametrize("stage", ["plan", "sample", "publish"])
def test_an_engine_that_hangs_anywhere_in_a_step_makes_no_progress(stage, monkeypatch):
    bench = Bench(stall_seconds=2.5)
    inside, release = threading.Event(), threading.Event()

    def hanging(proceed):
        def hang(*arguments):
            inside.set()
            release.wait()
            return proceed(*arguments)

        return hang

    sink = bench.sink
    if stage == "publish":
        sink = hanging(sink)
    else:
        owner = bench.engine.planner if stage == "plan" else bench.engine._sampler
        monkeypatch.setattr(owner, stage, hanging(getattr(owner, stage)))
    bench.engine.start()
    try:
        bench.engine.submit(request_of(Bench(), 1), sink)
        assert inside.wait(10)
        now = time.monotonic()
        assert bench.engine.progress(now)
        assert not bench.engine.progress(now + 2.6)
    finally:
        release.set()
        bench.engine.wait_until_idle()
        assert bench.engine.progress(time.monotonic() + 3600)
        bench.engine.close()


TIMES = StepTimes(
    prefill=Curve((1, 1000), (0.001, 0.1)),
    prefill_pair_seconds=0.0,
    decode=Curve((1,), (0.5,)),
    decode_context=1,
    decode_token_seconds=0.0,
)


@pytest.mark.parametrize(
    ("times", "prompt", "seconds"),
    [(None, 10, 2.5 + 10 * 0.05), (None, 1000, 2.5 + 1000 * 0.05), (TIMES, 1000, 2.5 + 4 * 0.1), (TIMES, 10, 2.5 + 4 * 0.002)],
)
def test_a_step_may_take_what_such_steps_take(times, prompt, seconds):
    bench = Bench(stall_seconds=2.5, stall_seconds_per_prompt_token=0.05)
    if times is not None:
        bench.engine.expect(times)
    due = []
    step = bench.model.step
    bench.model.step = lambda batch: (due.append(bench.engine.meter.step_due - time.monotonic()), step(batch))[1]
    bench.submit(1, [1] * prompt, 2)
    bench.run()
    decoding = 2.5 + (0.0 if times is None else 4 * 0.5)
    assert due == pytest.approx([seconds, decoding], abs=0.2)


def test_a_command_that_raises_ends_the_engine_and_all_hear_of_it():
    bench, dead = Bench(), threading.Event()
    bench.engine.on_death = lambda _: dead.set()
    bench.submit(1, [1] * 20, 900)
    for _ in range(3):
        bench.engine._commands.give(lambda: {}["a handle that nobody has"])
    bench.engine.start()
    assert dead.wait(20)
    assert bench.engine.failure == "KeyError: 'a handle that nobody has'"
    assert bench.finished[1].reason is Finish.FAILED
    assert bench.engine.blocks.counts().used == 0
    bench.engine.close()


def test_a_backend_that_exits_in_a_step_ends_the_engine_and_all_hear_of_it(monkeypatch):
    bench, dead = Bench(), threading.Event()
    bench.engine.on_death = lambda _: dead.set()
    monkeypatch.setattr(bench.model, "step", lambda _: sys.exit(3))
    bench.submit(1, [1] * 20, 900)
    bench.engine.start()
    assert dead.wait(20)
    assert bench.engine.failure == "SystemExit: 3"
    assert bench.finished[1].reason is Finish.FAILED
    bench.engine.close()


def test_what_a_backend_says_of_a_file_whose_name_is_no_text_can_be_told(monkeypatch):
    bench = Bench()

    def fails(_):
        raise OSError("no file b\udcff")

    with monkeypatch.context() as patched:
        patched.setattr(bench.model, "step", fails)
        bench.submit(1, [1] * 20, 4)
        bench.engine.step()
    bench.submit(2, [2] * 20, 4)
    bench.run()
    assert bench.finished[1].message.encode() == b"the backend failed: OSError: no file b?"
    assert bench.tokens[2] == expected([2] * 20, 4)
