"""Sequences that wait for another executor while their own engine sleeps, drains, fails and closes."""

import threading
import time

import numpy as np
import pytest
from fake_engine import Bench, expected
from joined_engines import PREFILL, JoinedBenches

from penstock.backends.contract import ModelLost
from penstock.common.handoff import HandoffFailure
from penstock.executor.engine import EngineDead
from penstock.executor.handoff.ports import SequenceEnded
from penstock.executor.handoff.ticket import Receive
from penstock.executor.messages import load_of
from penstock.executor.sequence import Finish, SequenceRequest

PROMPT = [(7 * k * k + k) % 97 for k in range(150)]


@pytest.fixture
def parked():
    """One sequence that receives, and the same one sending; nothing has been sent."""
    joined = JoinedBenches(Bench(prefill_chunk=64, max_batch_tokens=96))
    joined.handoff.hold = True
    joined.submit(1, PROMPT, 9)
    for _ in range(6):
        joined.step()
    assert load_of(joined.decode.engine).receiving == load_of(joined.prefill.engine).sending == 1
    return joined


def halves(joined):
    (sender,) = joined.handoff.senders.values()
    return (joined.prefill, sender.handle), (joined.decode, sender.receiver)


def ask(bench, handle, done):
    """For KV out of or into a sequence."""
    if isinstance(handle.request.handoff, Receive):
        bench.engine.handoff.import_kv(handle, range(5), np.zeros((1, 2, 5, 1, 4), np.float32), native=False, done=done)
    else:
        bench.engine.handoff.export_kv(handle, range(5), native=False, done=done)


HALVES = pytest.mark.parametrize("half", [0, 1], ids=["sending", "receiving"])


@HALVES
def test_a_sequence_that_waits_for_the_other_side_keeps_no_engine_busy_and_none_idle(parked, half):
    bench, _ = halves(parked)[half]
    steps, plan = [], bench.engine.planner.plan
    late = threading.Event()

    def counted():
        steps.append(plan())
        return steps[-1]

    def on_death(reason):
        raise AssertionError(reason)

    bench.engine.planner.plan = counted
    bench.engine.on_death = on_death
    bench.engine.start()
    waiting = threading.Thread(target=lambda: (bench.engine.wait_until_idle(), late.set()))
    waiting.start()
    try:
        for i in range(20):  # what others do goes on beside it
            told = threading.Event()
            bench.engine.submit(
                SequenceRequest(sequence_id=100 + i, prompt=[i], max_tokens=1), lambda f, t=told: t.set() if f.finished else None
            )
            assert told.wait(10)
        assert not late.is_set()
        assert bench.engine.progress(time.monotonic() + 3600)
        assert len(steps) < 100
        handle = halves(parked)[half][1]
        bench.engine.handoff.fail(handle, HandoffFailure.LEASE_EXPIRED, "")
        assert late.wait(10)
        assert bench.finished[1].handoff_failure is HandoffFailure.LEASE_EXPIRED
    finally:
        bench.engine.close()
        waiting.join()


def test_an_engine_that_only_waits_for_kv_wakes_for_a_deadline():
    joined, over = JoinedBenches(), threading.Event()
    steps, plan = [], joined.decode.engine.planner.plan

    def sink(frame):
        joined.decode.sink(frame)
        over.set() if frame.finished else None

    joined.decode.engine.planner.plan = lambda: steps.append(plan()) or steps[-1]
    joined.decode.engine.start()
    try:
        asked = SequenceRequest(
            sequence_id=1, prompt=PROMPT, max_tokens=9, handoff=Receive(PREFILL), deadline=time.monotonic() + 0.2
        )
        joined.decode.engine.submit(asked, sink)
        assert over.wait(10)
        assert joined.decode.finished[1].reason is Finish.DEADLINE
        assert len(steps) < 10
        assert [event for event, _ in joined.handoff.told] == ["reserved", "ended"]
    finally:
        joined.decode.engine.close()


def test_two_engines_in_their_threads_answer_as_one_does():
    joined, over = JoinedBenches(), threading.Semaphore(0)
    sink = joined.decode.sink

    def counting(frame):
        sink(frame)
        for _ in frame.finished:
            over.release()

    joined.decode.sink = counting
    for bench in (joined.prefill, joined.decode):
        bench.engine.start()
    try:
        for i in range(12):
            joined.submit(i, PROMPT[i : 10 * i + 5], 20)
        for _ in range(12):
            assert over.acquire(timeout=10)
        for bench in (joined.prefill, joined.decode):
            bench.engine.wait_until_idle()
            assert bench.engine.blocks.counts().used == 0
        assert joined.tokens == {i: expected(PROMPT[i : 10 * i + 5], 20) for i in range(12)}
    finally:
        for bench in (joined.prefill, joined.decode):
            bench.engine.close()


def test_an_engine_that_drains_lets_its_handoffs_finish(parked):
    for bench in (parked.prefill, parked.decode):
        bench.engine.drain()
        assert not bench.engine.idle
    parked.handoff.go_on()
    assert parked.run() == {1: expected(PROMPT, 9)}


def test_tokens_that_are_computed_elsewhere_are_no_work_that_waits():
    joined = JoinedBenches(decode=Bench(max_batch_size=2, max_batch_tokens=8))
    joined.handoff.hold = True
    for i in range(3):
        joined.submit(i, PROMPT[i:], 9)
    joined.decode.engine.step()
    load = load_of(joined.decode.engine)
    assert (load.running, load.waiting, load.receiving, load.sending, load.waiting_tokens) == (0, 2, 1, 0, 0)


@HALVES
def test_what_is_asked_of_a_sequence_that_has_ended_is_answered(parked, half):
    bench, handle = halves(parked)[half]
    answers = []
    ask(bench, handle, answers.append)
    bench.engine.abort_all(bench.sink if half == 0 else parked._decode_sink)
    bench.engine.step()
    ask(bench, handle, answers.append)
    bench.engine.handoff.fail(handle, HandoffFailure.ABORTED, "")  # too late, and does no harm
    bench.engine.handoff.handed_off(handle)
    bench.engine.step()
    assert [type(answer) for answer in answers] == [SequenceEnded] * 2
    assert parked.handoff.told.count(("ended", 1)) >= 1
    assert bench.engine.blocks.counts().used == 0
    assert 1 not in bench.finished  # it was aborted: nothing is told


@HALVES
@pytest.mark.parametrize("how", ["close", "death"])
def test_an_engine_that_ends_answers_all_and_tells_of_each_end_once(parked, half, how):
    bench, handle = halves(parked)[half]
    answers, began, release, compute = [], threading.Event(), threading.Event(), bench.model.step

    def step(batch):
        began.set()
        release.wait(10)
        if how == "death":
            raise ModelLost("the device is gone")
        bench.engine.close()  # as another thread may at any time; it can not wait for this one here
        return compute(batch)

    died = threading.Event()
    bench.engine.on_death = lambda _: died.set()
    bench.model.step = step
    bench.engine.start()
    bench.engine.submit(SequenceRequest(sequence_id=50, prompt=[1], max_tokens=2), bench.sink)
    assert began.wait(10)
    ask(bench, handle, answers.append)  # behind the step that does not come back
    release.set()
    bench.engine.close()
    assert died.is_set() is (how == "death")
    ask(bench, handle, answers.append)
    assert [type(answer) for answer in answers] == [SequenceEnded] * 2
    assert [event for event, _ in parked.handoff.told].count("ended") == 1
    assert handle in parked.handoff.over
    assert bench.engine.blocks.counts().used == 0
    late = []
    bench.engine.submit(SequenceRequest(sequence_id=51, prompt=[1], max_tokens=2), late.append)
    assert late[0].finished[0].reason is Finish.REFUSED


@HALVES
def test_a_backend_that_can_not_copy_costs_the_handoff_alone(parked, half):
    bench, _ = halves(parked)[half]

    def broken(*_):
        raise RuntimeError("no")

    bench.model.import_kv = bench.model.export_kv = broken
    bench.submit(9, PROMPT, 5)
    parked.handoff.go_on()
    parked.run()
    assert bench.tokens[9] == expected(PROMPT, 5)
    assert parked.decode.finished[1].handoff_failure is HandoffFailure.BACKEND
    assert parked.prefill.finished[1].handoff_failure is HandoffFailure.BACKEND


@HALVES
def test_a_model_that_is_lost_while_kv_is_copied_ends_the_engine(parked, half):
    bench, handle = halves(parked)[half]
    answers = []

    def lost(*_):
        raise ModelLost("the device is gone")

    bench.model.import_kv = bench.model.export_kv = lost
    bench.engine.handoff.export_kv(handle, range(5), native=False, done=answers.append)
    bench.engine.handoff.import_kv(handle, range(5), np.zeros((1, 2, 5, 1, 4), np.float32), native=False, done=answers.append)
    with pytest.raises(EngineDead, match="device is gone"):
        bench.engine.step()
    assert isinstance(answers[-1], ModelLost)


def slow_down(bench, monkeypatch, step_seconds):
    """A clock by which a copy takes a second, and nothing else but a step any time."""
    clock = [0.0]

    def slow(call, seconds):
        def called(*arguments):
            clock[0] += seconds
            return call(*arguments)

        return called

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    bench.model.export_kv, bench.model.step = slow(bench.model.export_kv, 1.0), slow(bench.model.step, step_seconds)


@pytest.mark.parametrize(("step_seconds", "copies"), [(0.1, 1), (39.0, 4)])
def test_copies_of_kv_take_a_small_share_of_the_time_while_others_decode(parked, monkeypatch, step_seconds, copies):
    bench, handle = parked.prefill, halves(parked)[0][1]
    bench.submit(9, [1], 40)
    bench.engine.step()
    slow_down(bench, monkeypatch, step_seconds)
    bench.engine.step()
    answers, told = [], len(bench.tokens[9])
    for _ in range(40):
        bench.engine.handoff.export_kv(handle, range(5), native=False, done=answers.append)
    for i in range(1, 11):
        bench.engine.step()
        assert len(answers) == i * copies
        assert len(bench.tokens[9]) == told + i


@pytest.mark.parametrize(("step_seconds", "copies"), [(0.1, 1), (79.0, 8)])
def test_a_sequence_that_has_only_to_leave_is_answered_within_its_share_of_a_step(parked, monkeypatch, step_seconds, copies):
    bench, handle = parked.prefill, halves(parked)[0][1]
    bench.submit(9, [1], 40)
    bench.engine.step()
    slow_down(bench, monkeypatch, step_seconds)
    bench.engine.step()
    answers = []

    def ask_again(data):
        """As a window that is full until the other side has answered."""
        answers.append(data)
        if len(answers) < 20:
            bench.engine.handoff.export_kv(handle, range(5), native=False, done=ask_again)

    bench.engine.handoff.export_kv(handle, range(5), native=False, done=ask_again)
    bench.engine.step()
    assert len(answers) == copies


def test_a_copy_that_is_not_wanted_any_more_costs_nothing(parked):
    bench, handle = parked.prefill, halves(parked)[0][1]
    copies, export = [], bench.model.export_kv
    bench.model.export_kv = lambda blocks, tokens: copies.append(tokens) or export(blocks, tokens)
    answers = []
    bench.engine.handoff.export_kv(handle, range(4), native=False, done=answers.append, wanted=lambda: False)
    bench.engine.handoff.export_kv(handle, range(5), native=False, done=answers.append)
    bench.engine.step()
    assert copies == [range(5)]
    assert isinstance(answers[0], SequenceEnded)
    assert isinstance(answers[1], np.ndarray)
