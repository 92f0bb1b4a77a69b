"""Two executors, whose words nothing orders but each one's own stream, around one request: any of them dies, refuses or fails at
any point, and the client still gets each token once and in order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scripted_ports import build

from penstock.common.errors import Unavailable
from penstock.common.handoff import HandoffFailure
from penstock.gateway.answer import FinishReason, Handoff
from penstock.gateway.ports import Lease, Loss, PrefillLease, SequenceEnd, Text
from penstock.gateway.states import State

LETTERS = "aé한😀"
ARRIVAL = Handoff(64, 0.1, 0.1, "grpc", native=False)
MOST = 9


@dataclass(eq=False)
class Sequence:
    """One sequence on an executor, as far as it has come there; what it has told may still be on its way."""

    sequence_id: int
    executor_id: str
    choice: object
    kind: str
    position: int
    stage: str = "new"
    peer: Sequence | None = None
    chunks: int = 3
    doom: HandoffFailure | None = None
    over: bool = False


@dataclass(eq=False)
class Words:
    """A frame on its way from an executor: what it calls, for one sequence."""

    sequence: Sequence
    deliver: object = field(repr=False)


class Executors:
    """All executors of a world. Each tells its own words in order; between two of them there is none."""

    def __init__(self, case, stop_at):
        self.case, self.request, self.stop_at = case, case.request, stop_at
        self.sequences: dict[int, Sequence] = {}
        self.streams: dict[str, deque[Words]] = {}
        self._known = 0

    def token_at(self, index, position):
        return self.case.eos if position == self.stop_at else (position + index) % 4

    def look(self):
        """Take up what was started and forget what was aborted."""
        ports = self.case.ports
        for (executor_id, _, ids, kind), sequence_id in zip(
            ports.starts[self._known :], range(self._known + 1, len(ports.starts) + 1), strict=True
        ):
            choice = ports.sequences.get(sequence_id)
            if choice is None:
                continue
            made = self.sequences[sequence_id] = Sequence(sequence_id, executor_id, choice, kind, len(ids))
            if kind == "send":
                made.peer = self.sequences[choice.sequence_id]
                made.peer.peer = made
        self._known = len(ports.starts)
        for sequence in list(self.sequences.values()):
            if sequence.sequence_id not in ports.sequences and not self._ends(sequence):
                self._drop(sequence)

    def _ends(self, sequence):
        return sequence.over and any(w.sequence is sequence for w in self.streams.get(sequence.executor_id, ()))

    def _drop(self, sequence, failure=HandoffFailure.ABORTED):
        """It is no more; the other half, if the KV is not over yet, hears of it from its own executor."""
        del self.sequences[sequence.sequence_id]
        self._part(sequence, failure)

    def _part(self, sequence, failure):
        peer, sequence.peer = sequence.peer, None
        if peer is not None and peer.peer is sequence:
            peer.peer = None
            if not peer.over and peer.stage != "arrived":
                peer.doom = failure

    def say(self, sequence, deliver):
        self.streams.setdefault(sequence.executor_id, deque()).append(Words(sequence, deliver))

    def end(self, sequence, deliver):
        sequence.over = True

        def last():
            self.case.ports.sequences.pop(sequence.sequence_id, None)
            deliver()

        self.say(sequence, last)

    def fail_handoff(self, sequence, failure):
        choice, sequence_id = sequence.choice, sequence.sequence_id
        self.end(sequence, lambda: self.request.handoff_failed(choice, sequence_id, failure, "no"))
        self._part(sequence, HandoffFailure.ABORTED)

    def lose(self, sequence, loss):
        choice, sequence_id = sequence.choice, sequence.sequence_id
        self.end(sequence, lambda: self.request.sequence_lost(choice, sequence_id, loss, "gone"))
        self._part(sequence, HandoffFailure.LEASE_EXPIRED)

    def kill(self, executor_id):
        """What it has not told is never told; its gateway notices, and in time so does its peer."""
        self.streams.pop(executor_id, None)
        gone = [s for s in self.sequences.values() if s.executor_id == executor_id]
        for sequence in gone:
            sequence.over = False
            self.lose(sequence, Loss.LOST)

    def step(self, sequence, doubled):
        if sequence.over:
            return
        if sequence.doom is not None:
            self.fail_handoff(sequence, sequence.doom)
        elif sequence.kind == "receive" and sequence.stage == "new":
            sequence.stage = "reserved"
            self.say(sequence, lambda: self.request.reserved_blocks(sequence.choice, sequence.sequence_id, b"ticket"))
        elif sequence.kind == "send" and sequence.chunks:
            sequence.chunks -= 1
        elif sequence.kind == "send" and sequence.stage == "drawn":
            peer = sequence.peer
            if peer is None:
                self.fail_handoff(sequence, HandoffFailure.ABORTED)
                return
            peer.stage, peer.position = "arrived", sequence.position
            self.say(peer, lambda: self.request.kv_arrived(peer.choice, peer.sequence_id, ARRIVAL))
            self.end(sequence, lambda: self.request.handed_off(sequence.choice, sequence.sequence_id, 0))
        elif sequence.kind != "receive" or sequence.stage == "arrived":
            self._draw(sequence, doubled)

    def _draw(self, sequence, doubled):
        choice, position = sequence.choice, sequence.position
        token = self.token_at(choice.index, position)
        for _ in range(1 + doubled):
            self.say(sequence, lambda: self.request.token(choice, token, position))
        sequence.position += 1
        sequence.stage = "drawn" if sequence.kind == "send" else sequence.stage
        ended = SequenceEnd.STOP if token == self.case.eos else None
        if ended is None and sequence.position >= self.request.plan.max_tokens:
            ended = SequenceEnd.LENGTH
        if ended is not None:
            self.end(sequence, lambda: self.request.sequence_ended(choice, sequence.sequence_id, ended, 0))
            self._part(sequence, HandoffFailure.ABORTED)

    def deliver(self, executor_id):
        stream = self.streams.get(executor_id)
        if not stream:
            return
        words = stream.popleft()
        if words.sequence.over or words.sequence.sequence_id in self.case.ports.sequences:
            words.deliver()
        self.look()


class Interleavings(RuleBasedStateMachine):
    """The rules are what the other services may do next."""

    @initialize(
        n=st.integers(1, 3),
        max_tokens=st.integers(1, MOST),
        stop_at=st.integers(0, MOST + 3),
        apart=st.sampled_from([False, True, True, True]),
    )
    def begin(self, n, max_tokens, stop_at, apart):
        self.case = build(n=n, max_tokens=max_tokens)
        self.request, self.ports = self.case.request, self.case.ports
        self.executors = Executors(self.case, stop_at)
        self.stop_at = stop_at
        self.decoded = {c.decoding_id: 0 for c in self.request.choices}
        self.leases = 0
        if apart:  # at once to where most can go wrong
            self.grant(apart=True)
            self.step(0, 1, doubled=False)
            self.executors.deliver("d1")

    @precondition(lambda self: self.request.state is State.QUEUED)
    @rule(apart=st.sampled_from([True, True, True, False]))
    def grant(self, apart):
        self.leases += 1
        prefill = PrefillLease(f"p{self.leases}", "host:2") if apart else None
        self.request.granted(Lease(f"d{self.leases}", "host:1", prefill=prefill))

    @rule(first=st.integers(0, 5), steps=st.integers(1, 2), doubled=st.booleans())
    def step(self, first, steps, doubled):
        """Every executor does something. What it tells is on its way."""
        for turn in range(steps):
            alive = [*self.alive("together"), *self.alive("receive"), *self.alive("send")]
            for i in range(len(alive)):
                self.executors.step(alive[(first + turn + i) % len(alive)], doubled)

    @rule(number=st.integers(0, 5), words=st.integers(1, 3))
    def deliver(self, number, words):
        streams = [name for name, stream in sorted(self.executors.streams.items()) if stream]
        for _ in range(words if streams else 0):
            self.executors.deliver(streams[number % len(streams)])

    def alive(self, kind):
        """Sequences of a kind, of which anything is still to be heard."""
        self.executors.look()
        return sorted((s for s in self.executors.sequences.values() if s.kind == kind), key=lambda s: s.sequence_id)

    @precondition(lambda self: self.alive("together"))
    @rule(number=st.integers(0, 5), fault=st.sampled_from(["kill", Loss.REFUSED, Loss.FAILED]))
    def lose_one_that_runs_together(self, number, fault):
        self.disturb(self.alive("together"), number, fault)

    @precondition(lambda self: self.alive("receive"))
    @rule(fault=st.sampled_from(["kill", Loss.REFUSED, HandoffFailure.LEASE_EXPIRED]))
    def lose_the_half_that_decodes(self, fault):
        self.disturb(self.alive("receive"), 0, fault)

    @precondition(lambda self: self.alive("send"))
    @rule(fault=st.sampled_from(["kill", "kill", Loss.FAILED, HandoffFailure.BACKEND]))
    def lose_the_half_that_prefills(self, fault):
        self.disturb(self.alive("send"), 0, fault)

    def disturb(self, among, number, fault):
        sequence = among[number % len(among)]
        if fault == "kill":
            self.executors.kill(sequence.executor_id)
        elif sequence.over:
            return
        elif isinstance(fault, Loss):
            self.executors.lose(sequence, fault)
        elif sequence.stage != "arrived":
            self.executors.fail_handoff(sequence, fault)

    @rule(number=st.integers(0, 2), tokens=st.integers(0, 3))
    def decode(self, number, tokens):
        choice = self.request.choices[number % len(self.request.choices)]
        ids = self.ports.decodings.get(choice.decoding_id)
        if ids is None:
            return
        last = choice.decoding_id in self.ports.finished
        done = min(len(ids), self.decoded[choice.decoding_id])
        upto = self.decoded[choice.decoding_id] = len(ids) if last else min(len(ids), done + tokens)
        if last:
            self.ports.decodings.pop(choice.decoding_id)
        offset = len(text_of(ids[:done]).encode())
        self.request.text(choice, Text(text_of(ids[done:upto]), offset, upto, last=last))

    @rule(tokenizer=st.booleans())
    def restart(self, tokenizer):
        if not tokenizer:
            self.request.scheduler_back()
            return
        self.ports.finished.clear()
        for choice in self.request.choices:
            if choice.decoding_id in self.ports.decodings:
                self.decoded[choice.decoding_id] = 0
                self.request.tokenizer_back(choice)

    @invariant()
    def nothing_is_held_that_nobody_needs(self):
        if not hasattr(self, "case"):
            return
        for sequence_id, choice in self.ports.sequences.items():
            assert choice.runs(sequence_id)
        halves = [c.apart for c in self.request.choices if c.apart is not None]
        assert bool(self.ports.prefilling) == any(not half.sent or half.sequence_id is not None for half in halves)
        assert bool(self.ports.placed) == (self.request.state not in {State.FLUSHING, State.DONE})

    def teardown(self):
        if not hasattr(self, "case"):
            return
        for turn in range(2000):
            if self.request.state is State.DONE:
                break
            if self.request.state is State.QUEUED:
                self.grant(apart=turn % 2 == 0)
            self.step(turn % 4, 1, doubled=False)
            for number in range(4):
                self.deliver(number, 2)
                self.decode(number, 2)
            self.nothing_is_held_that_nobody_needs()
        self.check()

    def check(self):
        request, told, case = self.request, self.case.told, self.case
        assert request.state is State.DONE, "nothing is waited for that does not come"
        assert case.ports.at_rest()
        assert len(case.done) == 1
        # Each placement: its choices, and for one of them a half that prefills, and one start anew.
        assert len(case.ports.starts) <= self.leases * (len(request.choices) + 2)
        if told.error is not None:
            assert isinstance(told.error, Unavailable)
            return
        for choice in request.choices:
            wanted = [self.executors.token_at(choice.index, p) for p in range(min(request.plan.max_tokens, self.stop_at + 1))]
            ids, reason = told.ids.get(choice.index, []), told.finishes[choice.index].reason
            if reason is FinishReason.ERROR:
                assert ids == wanted[: len(ids)]
                continue
            assert ids == wanted
            assert told.texts[choice.index] == text_of(i for i in wanted if i != case.eos)
            assert reason is (FinishReason.STOP if self.stop_at < request.plan.max_tokens else FinishReason.LENGTH)


def text_of(ids):
    return "".join(LETTERS[i] for i in ids)


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
