"""What gateways are told of handoffs, and what they ask, in messages."""

import pytest

from penstock.common.handoff import HandoffFailure
from penstock.executor.handoff.ticket import Arrival, Receive, Send, Ticket, Transport
from penstock.executor.messages import merge, read_start, read_ticket, tell_ticket
from penstock.executor.sequence import Finish, Finished, Frame
from penstock.internal.v1 import executor_pb2 as pb
from penstock.internal.v1 import handoff_pb2

TICKET = Ticket(bytes(range(16)), "decodes", "prefills", 64, 200, 3.5)


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({}, None),
        ({"receive": pb.ReceiveKv(prefill_executor_id="prefills")}, Receive("prefills")),
        ({"send": pb.SendKv(ticket=tell_ticket(TICKET))}, Send(TICKET)),
    ],
)
def test_a_start_says_where_kv_comes_from_or_goes(fields, asked):
    start = pb.StartSequence.FromString(pb.StartSequence(sequence_id=1, prompt_ids=[1], **fields).SerializeToString())
    assert read_start(start, 0.0).handoff == asked


def test_reservations_and_arrivals_are_told_with_the_frames_of_a_step():
    arrival = Arrival(4096, 0.25, 0.5, 0.125, Transport.SHARED_MEMORY, native=True, pushes=3, resumptions=1)
    response = merge([Frame(reserved=[(7, TICKET)]), Frame(arrived=[(8, arrival)])])
    (reserved,), (told,) = response.reserved, response.arrived
    assert (reserved.sequence_id, read_ticket(reserved.ticket)) == (7, TICKET)
    assert (told.sequence_id, told.kv_bytes, told.waited_us, told.transfer_us, told.exposed_us) == (
        8,
        4096,
        250_000,
        500_000,
        125_000,
    )
    assert (told.transport, told.native, told.pushes, told.resumptions) == (handoff_pb2.HANDOFF_TRANSPORT_SHARED_MEMORY, True, 3, 1)


@pytest.mark.parametrize("finish", Finish)
def test_every_finish_has_a_word_of_its_own(finish):
    (told,) = merge([Frame(finished=[Finished(1, finish)])]).finished
    assert pb.SequenceFinish.Name(told.reason) == f"SEQUENCE_FINISH_{finish.name}"


@pytest.mark.parametrize("failure", HandoffFailure)
def test_every_failure_of_a_handoff_has_a_word_of_its_own(failure):
    (told,) = merge([Frame(finished=[Finished(1, Finish.HANDOFF_FAILED, handoff_failure=failure)])]).finished
    assert pb.HandoffFailure.Name(told.handoff_failure) == f"HANDOFF_FAILURE_{failure.name}"
