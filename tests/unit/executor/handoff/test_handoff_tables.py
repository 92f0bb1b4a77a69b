"""Every state and event of both sides of a handoff, and what an event makes of a state."""

import asyncio
import weakref

import pytest
from handoff_net import GEOMETRY, Engine, Handle, Outgoing, run

from penstock.common.handoff import HandoffFailure
from penstock.executor.handoff import receiver, receiver_states, sender, sender_states
from penstock.executor.handoff.counts import HandoffCounts
from penstock.executor.handoff.line import Agreed, Line
from penstock.executor.handoff.receiver import Receiver
from penstock.executor.handoff.rooms import Rooms
from penstock.executor.handoff.sender import Sender
from penstock.executor.handoff.sender_states import Cut
from penstock.executor.handoff.speed import LinkSpeed
from penstock.executor.handoff.ticket import Ticket, Transport
from penstock.executor.handoff.transports.port import InlinePayload, Parcel
from penstock.executor.handoff.words import Abort, Aborted, Ack, Commit, Push, Pushed, Refusal, Refused, Reserved

ID = b"0123456789abcdef"
TICKET = Ticket(ID, "decode", "prefill", 0, 8, 3.0)
CUT = Cut(native=False, block_size=4, most_tokens=4, dtype="float32")


class Ports:
    """Notes what is asked for: names, in order."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        return lambda *facts, **named: self.asked.append((name, *facts[1:]))

    def names(self):
        return [name for name, *_ in self.asked]


def push(first, end, epoch=1):
    data = bytes(GEOMETRY.size(end - first, native=False))
    return Push(ID, epoch, range(first, end), False, "float32", Parcel(InlinePayload(data), 0))


# The side that decodes


def receiver_in(state):
    """A receiver on the shortest way to a state; its last chunk."""
    ports = Ports()
    receiver = Receiver(TICKET, object(), GEOMETRY, ports, 0.0)
    chunk = None
    if state is receiver_states.State.ENDED:
        receiver.sequence_ended()
    elif state is not receiver_states.State.RESERVED:
        receiver.reserve("stream")
        receiver.push(push(0, 4), "stream", 0.0, native_agreed=False)
        chunk = ports.asked[-1][1]
        if state is not receiver_states.State.RECEIVING:
            take(receiver, chunk)
            receiver.push(push(4, 8), "stream", 0.0, native_agreed=False)
            chunk = ports.asked[-1][1]
            receiver.commit(Commit(ID, 1, 8, 5), 0.0)
            if state is receiver_states.State.DONE:
                take(receiver, chunk)
    assert receiver.state is state
    ports.asked.clear()
    return receiver, chunk, ports


def take(receiver, chunk):
    receiver.checked(chunk, memoryview(chunk.push.parcel.payload.data))
    receiver.imported(chunk, Transport.GRPC, 0.0)


R = receiver_states.Event
RECEIVER_EVENTS = {
    R.RESERVE: lambda r, _: r.reserve("stream"),
    R.PUSH: lambda r, _: r.push(push(4, 8), "stream", 0.0, native_agreed=False),
    R.CHECKED: lambda r, c: r.checked(c, memoryview(bytes(64))),
    R.UNREADABLE: lambda r, c: r.unreadable(c, (Refusal.WRONG_CHECKSUM, "")),
    R.IMPORTED: lambda r, c: take(r, c) if c else r.imported(c, Transport.GRPC, 0.0),
    R.IMPORT_FAILED: lambda r, c: r.import_failed(c, "no such block"),
    R.COMMIT: lambda r, _: r.commit(Commit(ID, 1, 8, 5), 0.0),
    R.RENEW: lambda r, _: r.renew(),
    R.ABORT: lambda r, _: r.abort(),
    R.LEFT: lambda r, _: r.left(),
    R.RELEASE: lambda r, _: r.release(),
    R.STREAM_LOST: lambda r, _: r.stream_lost(),
    R.LEASE_EXPIRED: lambda r, _: r.lease_expired(),
    R.SEQUENCE_ENDED: lambda r, _: r.sequence_ended(),
}
# What becomes of RESERVED, RECEIVING, COMMITTING, DONE and ENDED, each by its first letters; and what is asked for.
RECEIVER_STATES = {
    R.RESERVE: "REC REC REC DON END",  # a chunk that is not checked when a new epoch begins is wanted again
    R.PUSH: "RES REC COM DON END",
    R.CHECKED: "RES REC COM DON END",
    R.UNREADABLE: "RES REC REC DON END",
    R.IMPORTED: "RES REC DON DON END",
    R.IMPORT_FAILED: "RES END END DON END",
    R.COMMIT: "RES REC COM DON END",
    R.RENEW: "RES REC COM DON END",
    R.ABORT: "END END END DON END",
    R.LEFT: "END END END DON END",
    R.RELEASE: "RES REC COM DON END",
    R.STREAM_LOST: "RES REC REC DON END",
    R.LEASE_EXPIRED: "END END COM DON END",
    R.SEQUENCE_ENDED: "END END END DON END",
}


@pytest.mark.parametrize("event", receiver_states.Event)
@pytest.mark.parametrize("state", receiver_states.State)
def test_each_event_moves_a_receiver_as_decided(state, event):
    receiver, chunk, ports = receiver_in(state)
    RECEIVER_EVENTS[event](receiver, chunk)
    after = RECEIVER_STATES[event].split()[list(receiver_states.State).index(state)]
    assert receiver.state.name.startswith(after)
    told = ports.names()
    ended = receiver.state is receiver_states.State.ENDED and state is not receiver_states.State.ENDED
    assert ("closed" in told) == (
        ended or (receiver.state is receiver_states.State.DONE and state is not receiver_states.State.DONE)
    )
    assert ("fail" in told) == (ended and event not in {R.SEQUENCE_ENDED, R.LEFT})
    assert ("leave" in told) == (ended and event is R.LEFT)
    assert ("begin_decode" in told) == (receiver.state is receiver_states.State.DONE and state is not receiver_states.State.DONE)


def test_both_tables_have_every_pair():
    for table, states, events in (
        (receiver.TABLE, receiver_states.State, receiver_states.Event),
        (sender.TABLE, sender_states.State, sender_states.Event),
    ):
        assert table.keys() == {(state, event) for state in states for event in events}
    assert all(len(row) == len(receiver_states.State) for row in Receiver.ROWS.values())
    assert all(len(row) == len(sender_states.State) for row in Sender.ROWS.values())


def test_an_aborted_receiver_answers_only_when_nothing_reads_the_payload_any_more():
    receiver, chunk, ports = receiver_in(receiver_states.State.RECEIVING)
    receiver.checked(chunk, memoryview(bytes(64)))
    receiver.abort()
    assert "answer" not in ports.names()
    receiver.imported(chunk, Transport.GRPC, 0.0)
    assert type(ports.asked[-1][1]).__name__ == "Aborted"


def test_what_is_heard_while_committing_counts_if_it_goes_back():
    receiver, chunk, _ = receiver_in(receiver_states.State.COMMITTING)
    receiver.heard(2.0)
    receiver.unreadable(chunk, (Refusal.WRONG_CHECKSUM, ""))
    assert receiver.leased
    assert receiver.lease_ends == 2.0 + TICKET.lease_seconds


def test_room_is_not_given_back_while_its_bytes_are_imported():
    receiver, chunk, ports = receiver_in(receiver_states.State.RECEIVING)
    free = []
    rooms = Rooms(64, free.append, LinkSpeed(lambda _: None))
    rooms.take(64)
    rooms.tell(chunk.push, 64, 0.0)
    receiver.checked(chunk, memoryview(bytes(GEOMETRY.size(4, native=False))))
    receiver.reserve("stream")
    receiver.push(chunk.push, "stream", 0.0, native_agreed=False)  # again, from before the Reserve
    hear(rooms, ports)
    assert not free  # the engine reads them still
    receiver.imported(chunk, Transport.GRPC, 0.0)
    hear(rooms, ports)
    assert free == [chunk.push.parcel.payload]


def hear(rooms, ports):
    for name, *facts in ports.asked:
        if name == "answer":
            rooms.hear(facts[0], 1.0)
    ports.asked.clear()


@pytest.mark.parametrize("state", [receiver_states.State.RECEIVING, receiver_states.State.DONE, receiver_states.State.ENDED])
def test_no_payload_is_kept_once_it_is_imported_or_not_wanted(state):
    receiver, chunk, ports = receiver_in(receiver_states.State.RECEIVING)
    held = [weakref.ref(chunk)]
    if state is receiver_states.State.ENDED:
        receiver.sequence_ended()
    else:
        take(receiver, chunk)
    if state is receiver_states.State.DONE:
        receiver.push(push(4, 8), "stream", 0.0, native_agreed=False)
        chunk = ports.asked[-1][1]
        held.append(weakref.ref(chunk))
        receiver.commit(Commit(ID, 1, 8, 5), 0.0)
        take(receiver, chunk)
    assert receiver.state is state
    del chunk
    ports.asked.clear()
    assert [chunk() for chunk in held] == [None] * len(held)


# The side that prefills


def sender_in(state):
    ports = Ports()
    sender = Sender(TICKET, object(), ports, 0.0)
    chunk = None
    if state is sender_states.State.FAILED:
        sender.sequence_ended()
    elif state is not sender_states.State.OPENING:
        sender.stream_up(CUT, 0.0)
        sender.reserved(Reserved(ID, 1, 0), 0.0)
        sender.computed(4)
        chunk = export(sender, ports)
        if state is not sender_states.State.PUSHING:
            sender.exported(chunk, 0.0)
            sender.drawn(5, 0.0)
            chunk = export(sender, ports)
            sender.exported(chunk, 0.0)
            if state is sender_states.State.DONE:
                sender.ack(Ack(ID, 1))
    assert sender.state is state
    ports.asked.clear()
    return sender, chunk, ports


def export(sender, ports):
    sender.room()
    chunk = next(facts[0] for name, *facts in reversed(ports.asked) if name == "export")
    chunk.parcel = Parcel(InlinePayload(b""), 0)
    return chunk


S = sender_states.Event
SENDER_EVENTS = {
    S.COMPUTED: lambda s, _: s.computed(8),
    S.DRAWN: lambda s, _: s.drawn(5, 1.0),
    S.ROOM: lambda s, _: s.room(),
    S.EXPORTED: lambda s, c: s.exported(c, 1.0),
    S.EXPORT_FAILED: lambda s, c: s.export_failed(c, HandoffFailure.BACKEND, ""),
    S.STREAM_UP: lambda s, _: s.stream_up(CUT, 1.0),
    S.STREAM_LOST: lambda s, _: s.stream_lost(1.0),
    S.RESERVED: lambda s, _: s.reserved(Reserved(ID, 2, 0), 1.0),
    S.PUSHED: lambda s, _: s.pushed(Pushed(ID, 1, 0), 1.0),
    S.ACK: lambda s, _: s.ack(Ack(ID, 1)),
    S.REFUSED: lambda s, _: s.refused(Refused(ID, 1, Refusal.UNKNOWN, ""), 1.0),
    S.ABORTED: lambda s, _: s.aborted(),
    S.OVERDUE: lambda s, _: s.overdue(1.0),
    S.LEASE_EXPIRED: lambda s, _: s.lease_expired(HandoffFailure.LEASE_EXPIRED, ""),
    S.UNREACHABLE: lambda s, _: s.unreachable(HandoffFailure.INCOMPATIBLE, ""),
    S.SEQUENCE_ENDED: lambda s, _: s.sequence_ended(),
}
# What becomes of OPENING, PUSHING, COMMITTING, DONE and FAILED.
SENDER_STATES = {
    S.COMPUTED: "OPE PUS COM DON FAI",
    S.DRAWN: "OPE PUS COM DON FAI",
    S.ROOM: "OPE PUS COM DON FAI",
    S.EXPORTED: "OPE PUS COM DON FAI",
    S.EXPORT_FAILED: "OPE FAI COM DON FAI",
    S.STREAM_UP: "OPE OPE OPE DON FAI",
    S.STREAM_LOST: "OPE OPE OPE DON FAI",
    S.RESERVED: "OPE PUS PUS DON FAI",  # while OPENING there is no stream here: an answer of an older one
    S.PUSHED: "OPE PUS COM DON FAI",
    S.ACK: "FAI FAI DON DON FAI",  # nothing was committed before: another has used the ticket
    S.REFUSED: "FAI FAI FAI DON FAI",
    S.ABORTED: "FAI FAI FAI DON FAI",
    S.OVERDUE: "OPE OPE OPE DON FAI",
    S.LEASE_EXPIRED: "FAI FAI FAI DON FAI",
    S.UNREACHABLE: "FAI FAI FAI DON FAI",
    S.SEQUENCE_ENDED: "FAI FAI FAI DON FAI",
}


@pytest.mark.parametrize("event", sender_states.Event)
@pytest.mark.parametrize("state", sender_states.State)
def test_each_event_moves_a_sender_as_decided(state, event):
    sender, chunk, ports = sender_in(state)
    SENDER_EVENTS[event](sender, chunk)
    after = SENDER_STATES[event].split()[list(sender_states.State).index(state)]
    assert sender.state.name.startswith(after)
    told = ports.names()
    failed = sender.state is sender_states.State.FAILED and state is not sender_states.State.FAILED
    done = sender.state is sender_states.State.DONE and state is not sender_states.State.DONE
    assert ("fail" in told) == (failed and event is not S.SEQUENCE_ENDED)
    assert ("handed_off" in told) == done
    assert ("closed" in told) == (failed or done)


@pytest.mark.parametrize("event", [S.RESERVED, S.SEQUENCE_ENDED, S.ABORTED])
def test_nothing_is_copied_out_for_room_that_a_dropped_chunk_leaves(event):
    sender, chunk, ports = sender_in(sender_states.State.PUSHING)
    sender.computed(8)
    exports = []
    ports.export = lambda _, chunk: exports.append(chunk)
    ports.drop = lambda sender, _: sender.room()  # at once, as the link does for whoever waits
    SENDER_EVENTS[event](sender, chunk)
    assert not exports


def test_an_end_is_said_again_until_it_is_answered():
    async def work():
        line = Line("decode", Engine(), GEOMETRY, HandoffCounts(), lambda: None)
        sender = Sender(TICKET, Handle(None, 8), line, asyncio.get_running_loop().time())
        assert line.join(sender)
        agreed = Agreed(Outgoing(), native=False, most_push_bytes=64, window_bytes=256)
        line.opened(agreed)
        sender.sequence_ended()
        line.hear(Refused(ID, 1, Refusal.WRONG_CHECKSUM, ""))  # of a push before
        line.lost(HandoffFailure.LEASE_EXPIRED, "the stream was cut")
        assert line.busy
        line.opened(agreed)
        assert isinstance(line.next_message(), Abort)
        line.hear(Aborted(ID, 0))
        assert not line.busy

    run(work())


def test_a_commit_that_gets_no_answer_is_said_again_in_a_new_epoch():
    sender, _, ports = sender_in(sender_states.State.COMMITTING)
    for epoch in range(2, 20):  # the other engine is amid a long step: it has all, and imports none
        assert sender.answer_due is not None
        sender.overdue(float(epoch))
        sender.reserved(Reserved(ID, epoch, 8), float(epoch))
        assert sender.state is sender_states.State.COMMITTING
        assert ports.asked[-1] == ("ask", Commit(ID, epoch, 8, 5))


@pytest.mark.parametrize("fault", ["late", "cut"])
def test_what_is_lost_again_and_again_ends_the_handoff_when_a_lease_has_passed(fault):
    """However fast or slowly the other side answers, and though it answers."""
    sender, _, ports = sender_in(sender_states.State.COMMITTING)
    asked, now, epoch = 0.0, 0.0, 1
    while sender.live:
        if fault == "late":
            now = sender.answer_due
            sender.overdue(now)
        else:
            now += 0.7
            sender.stream_lost(now)
            asked = asked or now
            now += 0.1
            sender.stream_up(CUT, now)
        epoch += 1
        sender.reserved(Reserved(ID, epoch, 0), now)  # it has nothing
        if sender.live:
            sender.exported(export(sender, ports), now)
        assert now <= asked + 4 / 3 * TICKET.lease_seconds
    assert now >= asked + TICKET.lease_seconds
    assert sender.failure is HandoffFailure.LEASE_EXPIRED


@pytest.mark.parametrize("reason", [Refusal.WRONG_CHECKSUM, Refusal.OUT_OF_RANGE, Refusal.INCOMPLETE])
def test_what_is_refused_again_and_again_ends_the_handoff(reason):
    sender, _, ports = sender_in(sender_states.State.COMMITTING)
    for epoch in range(1, 20):
        sender.refused(Refused(ID, epoch, reason, ""), 0.0)
        if not sender.live:
            break
        sender.reserved(Reserved(ID, epoch + 1, 8), 0.0)
    assert sender.failure is HandoffFailure.REFUSED
    assert "handed_off" not in ports.names()


def test_chunks_go_in_order_whichever_was_copied_first():
    ports = Ports()
    sender = Sender(TICKET, object(), ports, 0.0)
    sender.stream_up(CUT, 0.0)
    sender.reserved(Reserved(ID, 1, 0), 0.0)
    sender.computed(8)
    first, second = export(sender, ports), export(sender, ports)
    parcel, first.parcel = first.parcel, None
    sender.exported(second, 0.0)
    assert "push" not in ports.names()
    first.parcel = parcel
    sender.exported(first, 0.0)
    assert [facts[1].tokens for name, *facts in ports.asked if name == "push"] == [range(4), range(4, 8)]
