"""Two engines that share the work on each sequence answer as one does."""

from threading import Thread

import numpy as np
import pytest
from fake_engine import GREEDY, Bench, expected
from joined_engines import DECODE, Handoff, JoinedBenches

from penstock.backends.fake import BLOCK_SIZE
from penstock.common.handoff import HandoffFailure
from penstock.executor.handoff.ticket import Arrival, Receive, Send, Ticket, Transport
from penstock.executor.sampling import SamplingParameters
from penstock.executor.sequence import Finish, SequenceRequest

SMALL = {"prefill_chunk": 64, "max_batch_tokens": 96}


def prompt_of(length, first=0):
    return [(first + 7 * k * k + k) % 97 for k in range(length)]


def check_baseline(joined):
    for bench in (joined.prefill, joined.decode):
        assert bench.engine.idle
        assert bench.engine.blocks.counts().used == 0
    assert not joined.handoff.live


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 32, 200, 700])
@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_tokens_are_those_of_one_engine(length, count, native):
    joined = JoinedBenches(Bench(**SMALL), native=native)
    prompt = prompt_of(length)
    joined.submit(1, prompt, count)
    assert joined.run() == {1: expected(prompt, count)}
    if count == 1:  # the first token is the last
        assert joined.prefill.finished[1].reason is Finish.LENGTH
        assert not joined.decode.finished
        assert not joined.arrived
    else:
        assert joined.prefill.finished[1].reason is Finish.HANDED_OFF
        assert joined.decode.finished[1].reason is Finish.LENGTH
        assert joined.arrived[1].native is native
    assert joined.prefill.started.keys() == {1}
    assert not joined.decode.started
    check_baseline(joined)


FIELDS = {
    "greedy": {},
    "seeded": {"sampling": SamplingParameters(temperature=5.0, seed=3)},
    "penalties": {
        "sampling": SamplingParameters(
            temperature=3.0, seed=9, repetition_penalty=1.4, frequency_penalty=0.7, presence_penalty=0.5, logit_bias={3: 9.0}
        )
    },
    "log-probabilities": {"logprobs": 3, "prompt_logprobs": 2},
    "replayed": {"replayed": expected(prompt_of(100), 7), "sampling": SamplingParameters(repetition_penalty=1.2, seed=1)},
    "stop at the first": {"stop_ids": expected(prompt_of(100), 1)},
    "stop at the second": {"stop_ids": expected(prompt_of(100), 2)[1:]},
    "no stop before the fifth": {"stop_ids": expected(prompt_of(100), 30), "min_tokens": 4},
    "salt": {"salt": b"tenant"},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_all_that_is_asked_of_a_sequence_holds_across_two_engines(fields):
    whole, joined = Bench(**SMALL), JoinedBenches(Bench(**SMALL))
    whole.submit(1, prompt_of(100), 24, **fields)
    joined.submit(1, prompt_of(100), 24, **fields)
    assert joined.run() == whole.run()
    assert joined.logprobs == whole.logprobs
    last = joined.decode if joined.arrived else joined.prefill
    assert last.finished[1].reason is whole.finished[1].reason
    assert joined.prefill.started[1].cached_tokens == whole.started[1].cached_tokens
    frames = [*joined.prefill.frames, *joined.decode.frames]
    positions = [p for frame in frames for p in frame.positions]
    assert positions == [p for frame in whole.frames for p in frame.positions]
    check_baseline(joined)


def test_kv_leaves_while_prefill_still_runs_beside_decodes():
    joined = JoinedBenches(Bench(**SMALL))
    joined.prefill.submit(9, [1], 100)
    joined.prefill.engine.step()
    joined.submit(1, prompt_of(500), 3)
    joined.run()
    assert joined.arrived[1].pushes == -(-500 // 64)
    assert joined.tokens[9] == expected([1], 100)


def test_what_the_decoding_engine_has_cached_does_not_go_over_again():
    joined = JoinedBenches()
    prompt = prompt_of(100)
    joined.decode.submit(9, prompt, 3)
    joined.run()
    for i in (1, 2):
        joined.submit(i, prompt + [i] * 30, 3)
        joined.run()
    of_each = joined.decode.model.kv.canonical_bytes(1, "float32")
    assert joined.handoff.tickets[1].cached_tokens == 96
    assert joined.arrived[1].kv_bytes == (130 - 96) * of_each
    assert joined.tokens == {9: expected(prompt, 3)} | {i: expected(prompt + [i] * 30, 3) for i in (1, 2)}
    joined.submit(3, prompt + [1] * 30, 3)
    joined.run()
    assert joined.handoff.tickets[3].cached_tokens == 128
    # What the other engine has cached is its own affair.
    assert joined.prefill.started[3].cached_tokens == 128


def test_other_choices_wait_for_the_prefix_that_the_first_receives_and_share_it():
    joined = JoinedBenches(Bench(**SMALL))
    prompt = prompt_of(300)
    joined.handoff.hold = True
    joined.submit(0, prompt, 9, request_id="r")
    joined.step()
    for i in (1, 2, 3):
        joined.submit_together(i, prompt, 9, sampling=SamplingParameters(temperature=2.0, seed=i), request_id="r")
    for _ in range(20):
        joined.step()
    assert joined.decode.engine.meter.steps == 0
    assert joined.prefill.tokens == {0: expected(prompt, 1)}
    joined.handoff.go_on()
    joined.run()
    assert [joined.decode.started[i].cached_tokens for i in (1, 2, 3)] == [288] * 3
    assert joined.tokens[0] == expected(prompt, 9)
    whole = Bench()
    for i in (1, 2, 3):
        whole.submit(i, prompt, 9, sampling=SamplingParameters(temperature=2.0, seed=i))
    assert {i: joined.tokens[i] for i in (1, 2, 3)} == whole.run()
    check_baseline(joined)


def test_choices_that_wait_for_a_prefix_go_on_when_its_kv_does_not_come():
    joined = JoinedBenches()
    prompt = prompt_of(300)
    joined.handoff.hold = True
    joined.submit(0, prompt, 9, request_id="r")
    joined.step()
    joined.submit_together(1, prompt, 9, request_id="r")
    joined.step()
    assert not joined.decode.engine.planner.running
    (receiver,) = joined.handoff.receivers.values()
    joined.handoff.fail(joined.decode.engine.handoff, receiver, HandoffFailure.LEASE_EXPIRED, "nothing was heard")
    joined.decode.run()
    assert joined.decode.tokens == {1: expected(prompt, 9)}
    told = joined.decode.finished[0]
    assert (told.reason, told.handoff_failure, told.message) == (
        Finish.HANDOFF_FAILED,
        HandoffFailure.LEASE_EXPIRED,
        "nothing was heard",
    )


@pytest.mark.parametrize("request_id", ["", "another"])
def test_another_request_does_not_wait_for_kv_of_which_nothing_has_come(request_id):
    joined = JoinedBenches(Bench(**SMALL))
    prompt = prompt_of(300)
    joined.handoff.hold = True  # as where many are before it in the queue of the engine that prefills
    joined.submit(0, prompt, 9, request_id=request_id)
    joined.step()
    joined.submit_together(1, prompt, 9, request_id="this" if request_id else "")
    joined.step()
    assert joined.decode.started[1].cached_tokens == 0
    joined.handoff.go_on()
    joined.run()
    assert joined.tokens == {0: expected(prompt, 9), 1: expected(prompt, 9)}
    check_baseline(joined)


def test_another_request_waits_for_kv_that_has_begun_to_come():
    joined = JoinedBenches(Bench(**SMALL))
    prompt = prompt_of(300)
    joined.submit(0, prompt, 9, request_id="r")
    for _ in range(3):
        joined.step()
    joined.submit_together(1, prompt, 9, request_id="another")
    joined.run()
    assert joined.decode.started[1].cached_tokens == 288
    assert joined.tokens == {0: expected(prompt, 9), 1: expected(prompt, 9)}


def test_a_prefix_can_be_found_only_once_all_of_its_kv_is_there():
    joined = JoinedBenches(Bench(**SMALL))
    joined.submit(1, prompt_of(300), 9)
    for _ in range(3):
        joined.step()
    (receiver,) = joined.handoff.receivers.values()
    assert joined.decode.model.storage[receiver.table[0]].tolist() == prompt_of(300)[:BLOCK_SIZE]  # it has begun to come
    assert not joined.decode.engine.blocks.find(receiver.hashes)
    joined.run()
    assert len(joined.decode.engine.blocks.find(receiver.hashes)) == 308 // BLOCK_SIZE


def test_a_sequence_that_was_received_can_be_preempted_and_computed_anew():
    joined = JoinedBenches(decode=Bench(blocks=10))
    joined.submit(1, [1] * 40, 60, priority=0)
    joined.submit(2, [2] * 40, 60, priority=5)
    assert joined.run() == {1: expected([1] * 40, 60), 2: expected([2] * 40, 60)}
    assert joined.decode.finished[1].preemptions > 0
    check_baseline(joined)


def test_a_sequence_whose_kv_leaves_keeps_its_blocks_while_others_want_them():
    joined = JoinedBenches(Bench(blocks=10))
    joined.handoff.hold = True
    joined.prefill.submit(9, [9] * 30, 120, priority=5)
    joined.prefill.engine.step()
    joined.submit(1, prompt_of(90), 9)
    while 9 not in joined.prefill.finished and joined.prefill.engine.planner.running:
        joined.step()
    assert 9 not in joined.prefill.finished  # it was preempted itself, and waits
    assert joined.prefill.tokens[1] == expected(prompt_of(90), 1)
    joined.handoff.go_on()
    joined.run()
    assert joined.tokens == {1: expected(prompt_of(90), 9), 9: expected([9] * 30, 120)}
    check_baseline(joined)


def test_a_prompt_whose_kv_leaves_while_it_is_computed_is_not_preempted():
    joined = JoinedBenches(Bench(blocks=10, prefill_chunk=4, max_batch_tokens=16, max_batch_size=2))
    joined.prefill.submit(9, [9] * 30, 120, priority=5)
    joined.prefill.engine.step()
    joined.submit(1, prompt_of(110), 9)
    while 9 in {s.request.sequence_id for s in joined.prefill.engine.planner.running}:
        joined.step()
    assert 1 not in joined.prefill.tokens  # nine gave way to a prompt that was half computed
    assert joined.run() == {1: expected(prompt_of(110), 9), 9: expected([9] * 30, 120)}
    assert joined.prefill.finished[9].preemptions > joined.prefill.finished[1].preemptions == 0


def test_those_that_wait_for_kv_take_places_of_the_batch_and_leave_some_to_others():
    decode = Bench(max_batch_size=4, max_batch_tokens=64)
    joined = JoinedBenches(decode=decode)
    joined.handoff.hold = True
    for i in range(5):
        joined.submit(i, prompt_of(20, i), 5)
    for i in range(5, 9):
        decode.submit(i, prompt_of(20, i), 50)
    decode.engine.step()
    assert len(decode.engine.planner.receiving) == 2
    assert {s.request.sequence_id for s in decode.engine.planner.running} == {5, 6}
    joined.handoff.go_on()
    assert joined.run() == {i: expected(prompt_of(20, i), 5 if i < 5 else 50) for i in range(9)}


def test_two_engines_that_hand_over_to_each_other_never_wait_for_each_other():
    there = JoinedBenches(Bench(12, **SMALL, max_batch_size=3), Bench(12, **SMALL, max_batch_size=3))
    back = JoinedBenches(there.decode, there.prefill)
    there.prefill.engine.handoff.events = Crossed(sends=there.handoff, receives=back.handoff)
    there.decode.engine.handoff.events = Crossed(sends=back.handoff, receives=there.handoff)
    asked = {i: (prompt_of(40 + i, i), 5) for i in range(24)}
    for i, (prompt, count) in asked.items():
        (there if i % 2 else back).submit(i, prompt, count)
    for _ in range(2000):
        there.step()
        if there.prefill.engine.idle and there.decode.engine.idle:
            break
    check_baseline(there)
    told = {i: (there if i % 2 else back).tokens[i] for i in asked}
    assert told == {i: expected(*whole) for i, whole in asked.items()}


class Crossed:
    """What an engine tells that sends to the one it receives from: each kind of sequence has a handoff of its own."""

    def __init__(self, sends, receives):
        self._sends, self._receives = sends, receives
        self.reserved, self.begun, self.computed, self.drawn = receives.reserved, sends.begun, sends.computed, sends.drawn

    def ended(self, handle):
        (self._sends if isinstance(handle.request.handoff, Send) else self._receives).ended(handle)


class Answers(list):
    """What `done` was told."""

    def __call__(self, answer):
        self.append(answer)


@pytest.fixture
def reserved():
    """A bench that decodes, with a sequence that receives 50 tokens behind 64 cached ones."""
    joined = JoinedBenches()
    joined.decode.submit(9, prompt_of(64), 2)
    joined.decode.run()
    joined.handoff.hold = True
    joined.submit(1, prompt_of(114), 9)
    joined.decode.engine.step()
    assert joined.handoff.tickets[1].cached_tokens == 64
    return joined


@pytest.mark.parametrize(
    ("tokens", "shape", "told"),
    [
        (range(63, 70), None, "reserved"),
        (range(64), None, "reserved"),
        (range(100, 115), None, "reserved"),
        (range(-5, 3), None, "reserved"),
        (range(80, 70), None, "reserved"),
        (range(64, 100, 2), None, "reserved"),
        (range(64, 70), (1, 2, 7, 1, 4), "shape"),
        (range(64, 70), (2, 2, 6, 1, 4), "shape"),
    ],
)
def test_kv_that_was_not_reserved_or_does_not_fit_is_not_taken(reserved, tokens, shape, told):
    before, answers = reserved.decode.model.storage.copy(), Answers()
    (receiver,) = reserved.handoff.receivers.values()
    data = np.zeros(shape or reserved.decode.model.kv.canonical_shape(len(tokens)), np.float32)
    reserved.decode.engine.handoff.import_kv(receiver, tokens, data, native=False, done=answers)
    reserved.decode.engine.step()
    (error,) = answers
    assert isinstance(error, ValueError)
    assert told in str(error)
    assert np.array_equal(reserved.decode.model.storage, before)
    reserved.handoff.go_on()
    assert reserved.run()[1] == expected(prompt_of(114), 9)


@pytest.mark.parametrize(("tokens", "blocks"), [(range(64, 96), 1), (range(64, 100), 3), (range(70, 96), 2), (range(48, 80), 2)])
def test_blocks_that_were_not_reserved_or_are_not_whole_are_not_taken(reserved, tokens, blocks):
    before, answers = reserved.decode.model.storage.copy(), Answers()
    (receiver,) = reserved.handoff.receivers.values()
    data = np.zeros((blocks, BLOCK_SIZE * 8), np.uint8)
    reserved.decode.engine.handoff.import_kv(receiver, tokens, data, native=True, done=answers)
    reserved.decode.engine.step()
    assert isinstance(answers[0], ValueError)
    assert np.array_equal(reserved.decode.model.storage, before)


def test_what_is_not_computed_yet_can_not_be_copied_out():
    joined, answers = JoinedBenches(Bench(**SMALL)), Answers()
    joined.handoff.hold = True
    joined.submit(1, prompt_of(300), 9)
    joined.step()
    joined.step()
    (sender,) = joined.handoff.senders.values()
    joined.prefill.engine.handoff.export_kv(sender.handle, range(sender.computed + 1), native=False, done=answers)
    joined.prefill.engine.handoff.export_kv(sender.handle, range(sender.computed), native=False, done=answers)
    joined.prefill.engine.step()
    refused, data = answers
    assert isinstance(refused, ValueError)
    assert data[0, 0, :, 0, 0].tolist() == prompt_of(300)[: len(data[0, 0])]


def test_a_first_token_that_is_none_fails_the_handoff():
    joined = JoinedBenches()
    joined.handoff.hold = True
    joined.submit(1, prompt_of(20), 9)
    joined.decode.engine.step()
    (receiver,) = joined.handoff.receivers.values()
    joined.decode.engine.handoff.begin_decode(receiver, 97, Arrival(0, 0, 0, 0, Transport.GRPC, native=False, pushes=0))
    joined.decode.run()
    assert joined.decode.finished[1].handoff_failure is HandoffFailure.REFUSED


def test_a_sequence_can_be_given_up_as_soon_as_it_has_begun():
    bench = Bench()
    threads = []

    class GivingUp(Handoff):
        """As where the ticket is refused in the event loop, while another thread submits."""

        def begun(self, handle):
            give_up = Thread(target=bench.engine.handoff.fail, args=(handle, HandoffFailure.REFUSED, "the ticket is in use"))
            give_up.start()
            give_up.join(0.1)  # it may have to wait for this call's end
            threads.append(give_up)

    GivingUp(bench.engine, Bench().engine)
    ticket = Ticket(bytes(16), DECODE, "prefill", 0, 20, 3.0)
    bench.submit(1, [1] * 20, 3, handoff=Send(ticket))
    for thread in threads:
        thread.join()
    bench.run()
    assert bench.finished[1].reason is Finish.HANDOFF_FAILED
    bench.submit(2, [1], 3)
    assert bench.run()[2] == expected([1], 3)


def test_without_somebody_who_moves_kv_a_handoff_is_refused():
    bench = Bench()
    bench.engine.submit(SequenceRequest(sequence_id=1, prompt=[1], max_tokens=3, handoff=Receive("other")), bench.sink)
    assert bench.finished[1].reason is Finish.REFUSED
    assert "handoff" in bench.finished[1].message


@pytest.mark.parametrize(("kind", "able"), [("receive", "import_kv"), ("send", "export_kv")])
def test_a_backend_that_can_not_copy_kv_refuses_the_half_that_needs_it(kind, able):
    joined = JoinedBenches(Bench(**{able: False}), Bench(**{able: False}))
    joined.submit(1, prompt_of(20), 9)
    joined.decode.engine.step()
    refused = joined.decode if kind == "receive" else joined.prefill
    assert refused.finished[1].reason is Finish.REFUSED
    assert "backend" in refused.finished[1].message


@pytest.mark.parametrize(("cached", "tokens"), [(0, 19), (0, 21), (20, 20)])
def test_a_ticket_for_other_tokens_is_not_taken(cached, tokens):
    bench = Bench()
    Handoff(bench.engine, Bench().engine)
    ticket = Ticket(bytes(16), DECODE, "prefill", cached, tokens, 3.0)
    bench.engine.submit(
        SequenceRequest(sequence_id=1, prompt=[1] * 20, max_tokens=3, sampling=GREEDY, handoff=Send(ticket)), bench.sink
    )
    assert bench.finished[1].reason is Finish.FAILED
    assert "ticket" in bench.finished[1].message
