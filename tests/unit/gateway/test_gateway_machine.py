"""Every state with every event, and every interleaving: no token lost or doubled, and everything given back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_ports import build

from penstock.common.errors import Cancelled, DeadlineExceeded, Overloaded, Unavailable
from penstock.common.handoff import HandoffFailure
from penstock.gateway.answer import FallbackReason, FinishReason, Handoff
from penstock.gateway.ports import Lease, Loss, Refusal, SequenceEnd, SequenceStart, Text
from penstock.gateway.states import Event, State
from penstock.gateway.table import TABLE

LEASE = Lease("e0", "host:1")


def lose(request):
    """The executor, and with it every sequence."""
    for choice in request.choices:
        request.sequence_lost(choice, choice.sequence_id, Loss.LOST, "gone")


def bring(case, state):
    """A request to a state, with one token told wherever one can be."""
    request = case.request
    choice = request.choices[0]
    if state is State.QUEUED:
        return choice
    request.granted(LEASE)
    if state is State.PREFILLING:
        return choice
    request.token(choice, 5, 0)
    request.text(choice, Text("a", 0, 1))
    if state is State.FLUSHING:
        case.ports.sequences.clear()
        request.sequence_ended(choice, choice.sequence_id, SequenceEnd.LENGTH, 0)
    if state is State.DONE:
        request.cancel(Cancelled("gone"))
    return choice


def send(request, choice, event):
    {
        Event.GRANTED: lambda: request.granted(LEASE),
        Event.REFUSED: lambda: request.refused(Refusal(Overloaded("full", 1.0))),
        Event.SCHEDULER_BACK: request.scheduler_back,
        Event.TOKEN: lambda: request.token(choice, 6, len(choice.ids)),
        Event.SEQUENCE_ENDED: lambda: request.sequence_ended(choice, choice.sequence_id, SequenceEnd.LENGTH, 0),
        Event.SEQUENCE_LOST: lambda: lose(request),
        Event.RESERVED: lambda: request.apply(Event.RESERVED, choice, b"ticket"),
        Event.ARRIVED: lambda: request.apply(Event.ARRIVED, choice, Handoff(1, 0.0, 0.0, "grpc", native=True)),
        Event.HANDED_OFF: lambda: request.apply(Event.HANDED_OFF, choice, 0),
        Event.HANDOFF_FAILED: lambda: request.handoff_failed(choice, choice.sequence_id, HandoffFailure.BACKEND, "no"),
        Event.PREFILL_ENDED: lambda: request.apply(Event.PREFILL_ENDED, choice, SequenceEnd.STOP, 0),
        Event.PREFILL_LOST: lambda: request.apply(Event.PREFILL_LOST, choice, FallbackReason.PREFILL_LOST, "gone"),
        Event.TEXT: lambda: request.text(choice, Text("b", choice.told_bytes, len(choice.ids))),
        Event.TOKENIZER_BACK: lambda: request.tokenizer_back(choice),
        Event.CANCEL: lambda: request.cancel(Cancelled("gone")),
        Event.BREAK_OFF: lambda: request.break_off(Unavailable("leaving")),
        Event.DEADLINE: request.deadline,
    }[event]()


Q, P, D, F, X = State
OUTCOMES = {
    # event: the state behind it, from QUEUED, PREFILLING, DECODING, FLUSHING, DONE
    Event.GRANTED: (P, P, D, F, X),
    Event.REFUSED: (X, P, D, F, X),
    Event.SCHEDULER_BACK: (Q, P, D, F, X),
    Event.TOKEN: (Q, D, D, F, X),
    Event.SEQUENCE_ENDED: (Q, Q, F, F, X),  # a sequence that ends without a token is lost
    Event.SEQUENCE_LOST: (Q, Q, Q, F, X),
    # Of a handoff where there is none; the stages of one are in test_gateway_handoff.
    Event.RESERVED: (Q, P, D, F, X),
    Event.ARRIVED: (Q, P, D, F, X),
    Event.HANDED_OFF: (Q, P, D, F, X),
    Event.HANDOFF_FAILED: (Q, Q, Q, F, X),
    Event.PREFILL_ENDED: (Q, P, D, F, X),
    Event.PREFILL_LOST: (Q, P, D, F, X),
    Event.TEXT: (Q, P, D, F, X),
    Event.TOKENIZER_BACK: (Q, P, D, F, X),
    Event.CANCEL: (X, X, X, X, X),
    Event.BREAK_OFF: (X, X, X, X, X),
    Event.DEADLINE: (X, X, X, X, X),
}


def test_the_table_decides_every_pair():
    assert set(TABLE) == {(state, event) for state in State for event in Event}


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("state", State)
def test_each_event_in_each_state(state, event):
    case = build()
    choice = bring(case, state)
    assert case.request.state is state
    send(case.request, choice, event)
    assert case.request.state is OUTCOMES[event][list(State).index(state)]
    if case.request.state is State.DONE:
        assert case.ports.at_rest()
        assert len(case.done) == 1


def test_the_parts_of_the_time_to_the_first_text_add_up_to_it():
    now = 100.5
    case = build(clock=lambda: now, arrived=100.0)
    request, choice = case.request, case.request.choices[0]
    now = 101.0
    request.granted(Lease("e0", "host:1", queued_seconds=0.25))
    now = 102.5
    request.sequence_started(choice, choice.sequence_id, SequenceStart(0, 0.125, 0.75))
    request.token(choice, 5, 0)
    now = 102.75
    request.text(choice, Text("", 0, 0))
    request.text(choice, Text("a", 0, 1))
    now = 103.0
    request.token(choice, 6, 1)
    request.sequence_ended(choice, choice.sequence_id, SequenceEnd.LENGTH, 0)
    request.text(choice, Text("b", 1, 2, last=True))
    closing = case.told.closing
    assert (closing.encode_seconds, closing.queue_seconds, closing.prefill_seconds) == (0.5, 0.375, 0.75)
    assert (closing.first_token_seconds, closing.first_text_seconds, closing.total_seconds) == (2.5, 2.75, 3.0)
    parts = request.record.parts
    assert parts == {"encode": 0.5, "queue": 0.375, "prefill": 0.75, "hops": 0.875, "text": 0.25, "first_step": 0.5}
    assert sum(parts.values()) - parts["first_step"] == closing.first_text_seconds


def adds_up(record):
    parts = record.parts
    assert min(parts.values()) >= 0
    assert sum(parts[part] for part in ("encode", "queue", "prefill", "hops")) == record.first_token_seconds
    return parts["queue"], parts["prefill"], parts["hops"]


def test_they_are_those_of_the_choice_that_told_the_first_token():
    now = 100.5
    case = build(clock=lambda: now, arrived=100.0, n=2)
    request, (late, first) = case.request, case.request.choices
    now = 101.0
    request.granted(Lease("e0", "host:1", queued_seconds=0.25))
    now = 102.5
    request.sequence_started(first, first.sequence_id, SequenceStart(0, 0.125, 0.75))
    request.token(first, 5, 0)
    assert adds_up(request.record) == (0.375, 0.75, 0.875)
    now = 110.0
    request.sequence_started(late, late.sequence_id, SequenceStart(0, 8.0, 0.5))
    request.token(late, 5, 0)
    assert adds_up(request.record) == (0.375, 0.75, 0.875)
    assert (request.record.queue_seconds, request.record.prefill_seconds) == (8.25, 0.75)


def test_what_a_replacement_waits_for_behind_the_first_token_is_no_part_of_it():
    now = 100.5
    case = build(clock=lambda: now, arrived=100.0)
    request, choice = case.request, case.request.choices[0]
    now = 101.0
    request.granted(Lease("e0", "host:1", queued_seconds=0.25))
    lose(request)
    now = 103.0
    request.granted(Lease("e1", "host:2", queued_seconds=1.5))
    now = 104.0
    request.sequence_started(choice, choice.sequence_id, SequenceStart(0, 0.125, 0.75))
    request.token(choice, 5, 0)
    assert adds_up(request.record) == (1.875, 0.75, 0.875)
    lose(request)
    now = 109.0
    request.granted(Lease("e0", "host:1", queued_seconds=4.0))
    request.sequence_started(choice, choice.sequence_id, SequenceStart(0, 1.0, 1.0))
    request.token(choice, 6, 1)
    assert adds_up(request.record) == (1.875, 0.75, 0.875)
    assert request.record.queue_seconds == 5.875


@pytest.mark.parametrize("state", [State.QUEUED, State.PREFILLING])
def test_a_deadline_before_the_first_text_is_an_error(state):
    case = build()
    bring(case, state)
    case.request.deadline()
    assert isinstance(case.told.error, DeadlineExceeded)


@pytest.mark.parametrize("state", [State.DECODING, State.FLUSHING])
def test_a_deadline_behind_it_is_a_finish_reason(state):
    case = build()
    bring(case, state)
    case.request.deadline()
    assert case.told.finishes[0].reason is FinishReason.DEADLINE
    assert case.told.closing.completion_tokens == 1


def test_an_answer_that_is_broken_off_keeps_its_text_and_tells_why():
    for end, reason in (("break_off", FinishReason.CANCELLED), ("lose", FinishReason.ERROR)):
        case = build(n=2)
        choice = bring(case, State.DECODING)
        if end == "break_off":
            case.request.break_off(Unavailable("leaving"))
        for _ in range(3 if end == "lose" else 0):
            lose(case.request)
            case.request.granted(LEASE)
        assert case.told.texts[choice.index] == "a"
        assert [f.reason for f in case.told.finishes.values()] == [reason] * 2
        assert isinstance(case.request.error, Unavailable)
        assert case.told.closing is not None
        assert case.ports.at_rest()
    case = build()
    case.request.break_off(Unavailable("leaving"))
    assert isinstance(case.told.error, Unavailable)


def test_cached_tokens_are_those_of_one_choice_since_the_prompt_counts_once():
    case = build(n=2, max_tokens=1)
    case.request.granted(LEASE)
    for choice in case.request.choices:
        case.request.sequence_started(choice, choice.sequence_id, SequenceStart(3, 0.0, 0.0))
        case.request.token(choice, 5, 0)
        case.request.sequence_ended(choice, choice.sequence_id, SequenceEnd.LENGTH, 0)
        case.request.text(choice, Text("a", 0, 1, last=True))
    assert (case.told.closing.prompt_tokens, case.told.closing.cached_tokens) == (3, 3)


def test_attempts_are_bounded_while_no_token_comes_and_counted_anew_when_one_does():
    case = build()
    request = case.request
    for position in range(6):
        request.granted(LEASE)
        request.token(request.choices[0], 5, position)
        lose(request)
    assert case.told.error is None
    for _ in range(2):
        request.granted(LEASE)
        lose(request)
    assert isinstance(case.told.error, Unavailable)
    assert case.ports.at_rest()


def test_an_executor_lost_behind_the_last_token_is_not_asked_again():
    case = build(max_tokens=2)
    request, choice = case.request, case.request.choices[0]
    request.granted(LEASE)
    request.token(choice, 5, 0)
    request.token(choice, 6, 1)
    lose(request)
    assert request.state is State.FLUSHING
    request.text(choice, Text("ab", 0, 2, last=True))
    assert case.told.finishes[0].reason is FinishReason.LENGTH
    assert case.told.texts[0] == "ab"


def test_a_gap_in_positions_is_a_lost_sequence():
    case = build()
    request, choice = case.request, case.request.choices[0]
    request.granted(LEASE)
    request.token(choice, 5, 0)
    request.token(choice, 7, 2)
    assert choice.ids == [5]
    assert request.state is State.QUEUED
    assert case.ports.placings[-1].avoid == ("e0",)


class World:
    """Executors, tokenizer and scheduler around one request; `step` lets one of them do something, lawful or late."""

    LETTERS = "aé한😀"

    def __init__(self, case, stop_at):
        self.case, self.request, self.stop_at = case, case.request, stop_at
        self.decoded = {c.decoding_id: 0 for c in self.request.choices}
        self.leases = 0

    def token_at(self, index, position):
        return self.case.eos if position == self.stop_at else (position + index) % 4

    def text_of(self, ids):
        return "".join(self.LETTERS[i] for i in ids)

    def step(self, action, pick):
        ports, request = self.case.ports, self.request
        choice = request.choices[pick % len(request.choices)]
        getattr(self, action)(ports, request, choice, pick)

    def grant(self, ports, request, choice, pick):
        if request.state is State.QUEUED:
            self.leases += 1
            request.granted(Lease(f"e{self.leases}", "host:1"))

    def tokens(self, ports, request, choice, pick):
        sequence_id = choice.sequence_id
        if sequence_id is None:
            return
        for position in range(max(0, len(choice.ids) - pick % 2), len(choice.ids) + 1 + pick % 2):  # some are doubled
            if position >= request.plan.max_tokens or choice.sequence_id is None:
                break
            token = self.token_at(choice.index, position)
            request.token(choice, token, position)
            last = token == self.case.eos or position + 1 == request.plan.max_tokens
            if last and pick % 3:  # otherwise the end is not told before the executor is lost
                ports.sequences.pop(sequence_id, None)
                request.sequence_ended(
                    choice, choice.sequence_id, SequenceEnd.STOP if token == self.case.eos else SequenceEnd.LENGTH, 0
                )
                break
            if last:
                lose(request)
                break

    def texts(self, ports, request, choice, pick):
        ids = ports.decodings.get(choice.decoding_id)
        if ids is None:
            return
        done = self.decoded[choice.decoding_id] = min(len(ids), self.decoded[choice.decoding_id])
        upto = len(ids) if choice.decoding_id in ports.finished else min(len(ids), done + pick % 3)
        last = choice.decoding_id in ports.finished
        offset = len(self.text_of(ids[:done]).encode())
        self.decoded[choice.decoding_id] = upto
        if last:
            ports.decodings.pop(choice.decoding_id)
        request.text(choice, Text(self.text_of(ids[done:upto]), offset, upto, last=last))

    def lose_executor(self, ports, request, choice, pick):
        if any(c.sequence_id for c in request.choices):
            lose(request)

    def lose_tokenizer(self, ports, request, choice, pick):
        ports.finished.clear()
        for other in request.choices:
            if other.decoding_id in ports.decodings:
                self.decoded[other.decoding_id] = 0
                request.tokenizer_back(other)

    def lose_scheduler(self, ports, request, choice, pick):
        request.scheduler_back()

    def finish(self):
        for _ in range(400):
            for pick in (1, 2, 4, 5):
                for action in ("grant", "tokens", "texts"):
                    for index in range(len(self.request.choices)):
                        choice = self.request.choices[index]
                        getattr(self, action)(self.case.ports, self.request, choice, pick)
            if self.request.state is State.DONE:
                return


ACTIONS = ["grant", "tokens", "texts", "lose_executor", "lose_tokenizer", "lose_scheduler"]
SCRIPT = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 5)), max_size=60)


@settings(deadline=None, max_examples=300)
@given(script=SCRIPT, n=st.integers(1, 3), max_tokens=st.integers(1, 9), stop_at=st.integers(0, 12))
def test_losses_cost_no_token_and_no_text(script, n, max_tokens, stop_at):
    case = build(n=n, max_tokens=max_tokens)
    world = World(case, stop_at)
    for action, pick in script:
        world.step(action, pick)
        if isinstance(case.request.error, Unavailable):  # more losses in a row than there are attempts
            assert case.ports.at_rest()
            unfinished = [finish for finish in case.told.finishes.values() if finish.reason is FinishReason.ERROR]
            assert bool(unfinished) is (case.told.error is None), "behind the first text it is a finish"
            return
    world.finish()
    assert case.request.state is State.DONE
    assert case.ports.at_rest()
    for index in range(n):
        ids = [world.token_at(index, p) for p in range(min(max_tokens, stop_at + 1))]
        assert case.told.ids[index] == ids
        assert case.told.texts[index] == world.text_of(i for i in ids if i != case.eos)
        stopped = stop_at < max_tokens
        assert case.told.finishes[index].reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
    assert case.told.closing.completion_tokens == n * min(max_tokens, stop_at + 1)


@settings(deadline=None, max_examples=200)
@given(script=SCRIPT, n=st.integers(1, 3), end=st.sampled_from(["cancel", "deadline"]))
def test_an_end_at_any_point_gives_everything_back(script, n, end):
    case = build(n=n)
    world = World(case, 99)
    for action, pick in script:
        world.step(action, pick)
    told = dict(case.told.texts)
    if end == "cancel":
        case.request.cancel(Cancelled("gone"))
    else:
        case.request.deadline()
    assert case.request.state is State.DONE
    assert case.ports.at_rest()
    assert len(case.done) == 1
    for action, pick in script:  # what comes late changes nothing
        world.step(action, pick)
    assert case.told.texts == told
    assert case.ports.at_rest()
