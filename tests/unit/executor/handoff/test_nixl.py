"""KV by NVIDIA's NIXL between two agents of this machine, wherever its package can be imported."""

import gc
import struct
from importlib.util import find_spec

import psutil
import pytest

from penstock.executor.handoff.ticket import Transport
from penstock.executor.handoff.transports.negotiation import Attachment, Transports
from penstock.executor.handoff.transports.nixl import NixlIncoming, NixlOutgoing
from penstock.executor.handoff.transports.port import (
    DevicePayload,
    LinkClosed,
    PayloadOutOfRange,
    PayloadUnproven,
    TransportFailed,
    WrongChecksum,
)

WINDOW = 1 << 16


@pytest.fixture
def ends():
    incoming = NixlIncoming(WINDOW)
    outgoing = NixlOutgoing(incoming.offer)
    assert incoming.prove(outgoing.answer)
    yield outgoing, incoming
    outgoing.close()
    incoming.close()


@pytest.mark.skipif(find_spec("nixl") is None, reason="NVIDIA has no wheel of nixl for this system")
class TestNixl:
    async def test_bytes_come_out_as_they_went_in(self, ends):
        outgoing, incoming = ends
        for filled in range(8):  # twice the window in all
            data = bytes([filled]) * (WINDOW // 4)
            parcel = await outgoing.put(memoryview(data))
            assert bytes(await incoming.open(parcel.payload, parcel.checksum)) == data
            outgoing.taken(parcel.payload)

    async def test_what_was_not_written_there_is_refused(self, ends):
        outgoing, incoming = ends
        parcel = await outgoing.put(memoryview(b"kv" * 100))
        with pytest.raises(WrongChecksum):
            await incoming.open(parcel.payload, parcel.checksum ^ 1)
        for offset, size in ((0, 0), (0, WINDOW + 1), (WINDOW, 1), (2**64 - 1, 2**64 - 1)):
            with pytest.raises(PayloadOutOfRange):
                await incoming.open(DevicePayload(struct.pack("!QQ", offset, size)), 0)
        with pytest.raises(PayloadOutOfRange, match="two integers"):
            await incoming.open(DevicePayload(b"\x80\x04."), 0)

    async def test_nothing_is_opened_behind_a_wrong_proof(self):
        incoming = NixlIncoming(WINDOW)
        assert not incoming.prove(bytes(32))
        with pytest.raises(PayloadUnproven):
            await incoming.open(DevicePayload(struct.pack("!QQ", 0, 1)), 0)
        incoming.close()

    def test_an_offer_that_is_none_is_not_reached(self):
        for offer in (b"", bytes(16), struct.pack("!QQ", 0, 1 << 40) + b"x", struct.pack("!QQ", 0, WINDOW) + b"no metadata"):
            with pytest.raises(TransportFailed):
                NixlOutgoing(offer)

    async def test_nothing_can_be_written_into_a_link_that_was_closed(self, ends):
        outgoing, incoming = ends
        await outgoing.put(memoryview(b"kv"))
        incoming.close()

        async def write():
            for _ in range(1000):  # this side hears of it a moment later
                await outgoing.put(memoryview(b"kv"))

        with pytest.raises(TransportFailed):
            await write()
        outgoing.close()
        with pytest.raises(LinkClosed):
            await outgoing.put(memoryview(b"kv"))
        with pytest.raises(LinkClosed):
            await incoming.open(DevicePayload(struct.pack("!QQ", 0, 2)), 0)

    async def test_descriptors_and_threads_go_with_the_link(self):
        async def one():
            sides = Transports((Transport.NIXL, Transport.GRPC)), Transports((Transport.NIXL, Transport.SHARED_MEMORY))
            receiving = await sides[1].receiving(WINDOW, sides[0].names)
            sending = sides[0].sending(receiving.offer)
            attachment = await sending.attach()
            assert attachment.transport is Transport.NIXL
            sending.attached(accepted=receiving.attach(attachment))
            parcel = await sending.put(memoryview(b"kv"))
            assert bytes(await receiving.open(parcel.payload, parcel.checksum)) == b"kv"
            assert sending.transport is receiving.transport is Transport.NIXL
            sending.close()
            receiving.close()

        held = []
        for _ in range(3):
            await one()
            gc.collect()
            held.append(psutil.Process().num_fds())
        assert held[1] == held[2]


async def test_an_executor_without_it_takes_what_there_is(monkeypatch):
    monkeypatch.setattr("penstock.executor.handoff.transports.negotiation.missing", lambda: "nixl can not be imported: absent")
    transports = Transports((Transport.NIXL, Transport.GRPC))
    assert transports.names == (Transport.GRPC,)
    receiving = await transports.receiving(WINDOW, [Transport.NIXL, Transport.GRPC])
    assert (receiving.offer.transports, receiving.offer.nixl) == ((Transport.GRPC,), b"")
    assert not receiving.attach(Attachment(Transport.NIXL, bytes(32)))
    receiving.close()
