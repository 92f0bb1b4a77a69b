"""Requests that tell the event log of themselves: what they tell is whole, and they do nothing else than they would without it."""

import json

import pytest
from history import Fault, check, sums
from scripted_ports import build

from penstock.common.errors import Cancelled
from penstock.common.events import EventLog
from penstock.common.handoff import HandoffFailure
from penstock.common.service import StartError
from penstock.gateway.answer import Handoff
from penstock.gateway.config import GatewayConfig
from penstock.gateway.history import History
from penstock.gateway.ports import Lease, Loss, PrefillLease, SequenceEnd, Text
from penstock.gateway.server import GatewayServer

APART = Lease("d0", "host:1", 9, 0.5, PrefillLease("p0", "host:2", 7))
TOGETHER = Lease("d1", "host:3")
ARRIVAL = Handoff(1 << 20, 0.25, 0.125, "shared_memory", native=True)


class Run:
    """One request with a log, and the executors' words to it."""

    def __init__(self, folder):
        self.file = folder / "events"
        self.log = EventLog(self.file, "gateway")
        self.history = History(self.log)
        self.case = build(new=self.history.request, max_tokens=4)
        self.request, self.choice = self.case.request, self.case.request.choices[0]

    def place(self, lease):
        self.request.granted(lease)

    def reserve(self):
        self.request.reserved_blocks(self.choice, self.choice.sequence_id, b"ticket")

    def arrive(self):
        self.request.kv_arrived(self.choice, self.choice.sequence_id, ARRIVAL)

    def token(self, executor_id, position):
        self.history.token(self.choice, executor_id, 50 + position, position)
        self.request.token(self.choice, 50 + position, position)

    def text(self, tokens, last=False):
        self.request.text(self.choice, Text("x" * (tokens - self.choice.told_bytes), self.choice.told_bytes, tokens, last=last))

    def finish(self, executor_id, position):
        for place in range(position, 4):
            self.token(executor_id, place)
        self.request.sequence_ended(self.choice, self.choice.sequence_id, SequenceEnd.LENGTH, 0)
        self.text(4, last=True)

    def events(self):
        self.log.close()
        return [json.loads(line) for line in self.file.read_text().splitlines()]

    def told(self):
        return [event["event"] for event in self.events()[1:]]


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_a_request_that_runs_apart(run):
    run.place(APART)
    run.reserve()
    run.token("p0", 0)
    run.text(1)
    run.arrive()
    run.request.handed_off(run.choice, run.choice.apart.sequence_id, 0)
    run.finish("d0", 1)
    assert run.case.told.closing is not None
    events = run.events()
    assert check(events, [], [], 1.0) == []
    middle = [event["event"] for event in events[1:] if event["event"] not in {"token", "told"}]
    assert middle == ["accepted", "placed", "started", "reserved", "started", "arrived", "handed off", "ended"]
    assert [event["half"] for event in events if event["event"] == "started"] == ["decode", "prefill"]
    assert [event["executor_id"] for event in events if event["event"] == "token"] == ["p0", "d0", "d0", "d0"]
    assert (sums(events).arrivals, sums(events).kv_bytes) == (1, 1 << 20)


def test_tokens_that_the_other_half_tells_early(run):
    run.place(APART)
    run.reserve()
    run.arrive()
    run.token("d0", 1)
    run.token("p0", 0)
    run.finish("d0", 2)
    assert check(run.events(), [], [], 1.0) == []


def test_fallbacks_have_their_reasons_and_the_last_one_is_told_at_the_end(run):
    run.place(APART)
    run.reserve()
    run.token("p0", 0)
    run.request.handoff_failed(run.choice, run.choice.sequence_id, HandoffFailure.LEASE_EXPIRED, "quiet")
    run.token("d0", 1)
    run.request.sequence_lost(run.choice, run.choice.sequence_id, Loss.LOST, "gone")
    run.place(TOGETHER)
    run.finish("d1", 2)
    events = run.events()
    assert check(events, [], [Fault(0.0, "before all of it")], 1.0) == []
    assert dict(sums(events).fallbacks) == {
        ("recompute_on_decode", "lease_expired"): 1,
        ("replaced", "decode_lost"): 1,
    }
    assert (events[-1]["event"], events[-1]["fallback"], events[-1]["told"]) == ("ended", "replaced", [4])
    assert [event["replayed"] for event in events if event["event"] == "started"] == [0, 0, 1, 2]


def test_words_of_a_sequence_that_was_given_up_are_not_told(run):
    run.place(APART)
    old = run.choice.sequence_id
    run.request.sequence_lost(run.choice, old, Loss.LOST, "gone")
    run.request.sequence_lost(run.choice, old, Loss.LOST, "gone")
    run.request.reserved_blocks(run.choice, old, b"ticket")
    run.request.kv_arrived(run.choice, old, ARRIVAL)
    run.request.granted(TOGETHER)
    run.request.granted(TOGETHER)
    run.request.cancel(Cancelled("the client is gone"))
    run.request.cancel(Cancelled("the client is gone"))
    assert run.told() == ["accepted", "placed", "started", "lost", "fallback", "placed", "started", "ended"]


def test_a_request_that_fails_ends_with_its_error(run):
    run.place(TOGETHER)
    run.request.cancel(Cancelled("the client is gone"))
    assert run.events()[-1]["outcome"] == "Cancelled"
    assert run.case.ports.at_rest()


async def test_an_event_log_that_can_not_be_opened_is_all_that_is_told(tmp_path):
    gateway = GatewayServer(GatewayConfig(http="127.0.0.1:0", grpc="127.0.0.1:0", event_log=str(tmp_path)))
    with pytest.raises(StartError, match=r"event_log: .*: Is a directory"):
        await gateway.start()
    await gateway.close()
