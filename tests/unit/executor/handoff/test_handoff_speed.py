from penstock.executor.handoff.counts import HandoffCounts
from penstock.executor.handoff.ticket import Arrival, Transport

MIB = 1 << 20


def arrival(kv_bytes, exposed):
    return Arrival(
        kv_bytes=kv_bytes,
        waited=0.0,
        transfer=1.0,
        exposed=exposed,
        transport=Transport.GRPC,
        native=False,
        pushes=1,
        resumptions=0,
    )


def test_speed_is_of_what_prefill_did_not_hide():
    counts = HandoffCounts()
    counts.arrived(arrival(100 * MIB, 0.5))
    assert counts.bytes_per_second == 200 * MIB
    counts.arrived(arrival(100 * MIB, 0.25))
    assert 200 * MIB < counts.bytes_per_second < 400 * MIB


def test_few_bytes_tell_no_speed():
    counts = HandoffCounts()
    counts.arrived(arrival(MIB - 1, 0.5))
    counts.arrived(arrival(100 * MIB, 0.0))
    assert counts.bytes_per_second == 0
    assert counts.moved[Transport.GRPC].handoffs == 2
