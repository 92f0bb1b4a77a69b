"""Which transport a link takes."""

import asyncio
import secrets
import threading

import pytest
from structlog.testing import capture_logs

from penstock.executor.handoff.ticket import Transport
from penstock.executor.handoff.transports import segments
from penstock.executor.handoff.transports.negotiation import Attachment, Transports
from penstock.executor.handoff.transports.port import (
    DevicePayload,
    InlinePayload,
    LinkClosed,
    PayloadUnproven,
    SharedPayload,
    TransportFailed,
    WrongChecksum,
    checksum,
)

BOTH = (Transport.SHARED_MEMORY, Transport.GRPC)


async def settled(sender=BOTH, receiver=BOTH, spoil=lambda attachment: attachment):
    sending_side, receiving_side = Transports(sender), Transports(receiver)
    receiving = await receiving_side.receiving(1 << 16, sending_side.names)
    sending = sending_side.sending(receiving.offer)
    while (attachment := await sending.attach()) is not None:
        sending.attached(accepted=receiving.attach(spoil(attachment)))
    return sending, receiving


@pytest.mark.parametrize(
    ("sender", "receiver", "taken"),
    [
        (BOTH, BOTH, Transport.SHARED_MEMORY),
        (BOTH, (Transport.GRPC,), Transport.GRPC),
        ((Transport.GRPC,), BOTH, Transport.GRPC),
        (BOTH, (Transport.SHARED_MEMORY,), Transport.SHARED_MEMORY),
    ],
)
async def test_the_cheapest_that_both_allow_is_taken(sender, receiver, taken):
    sending, receiving = await settled(sender, receiver)
    parcel = await sending.put(memoryview(b"kv"))
    assert bytes(await receiving.open(parcel.payload, parcel.checksum)) == b"kv"
    assert sending.transport is receiving.transport is taken
    sending.taken(parcel.payload)
    sending.close()
    receiving.close()


async def test_a_wrong_proof_leaves_grpc(recwarn):
    sending, receiving = await settled(spoil=lambda attachment: Attachment(attachment.transport, bytes(32)))
    parcel = await sending.put(memoryview(b"kv"))
    assert isinstance(parcel.payload, InlinePayload)
    assert bytes(await receiving.open(parcel.payload, parcel.checksum)) == b"kv"
    with pytest.raises(PayloadUnproven):
        await receiving.open(SharedPayload(0, 2), checksum(b"kv"))
    sending.close()
    receiving.close()


async def test_a_segment_that_was_never_asked_for_goes_with_the_first_payload():
    receiving = await Transports().receiving(1 << 16, BOTH)
    name = receiving.offer.shared.name
    await receiving.open(InlinePayload(b"kv"), checksum(b"kv"))
    assert not (segments.FOLDER / name).exists()
    receiving.close()


async def test_a_segment_that_is_made_for_nobody_any_more_does_not_stay(monkeypatch):
    begun, go, unlinked, create, offers = threading.Event(), threading.Event(), asyncio.Event(), segments.create, []

    def slowly(size):
        begun.set()
        go.wait()
        segment, offer = create(size)
        offers.append(offer)
        unlink = segment.unlink
        segment.unlink = lambda: (unlink(), unlinked.set())
        return segment, offer

    monkeypatch.setattr(segments, "create", slowly)
    task = asyncio.create_task(Transports().receiving(1 << 16, BOTH))
    await asyncio.to_thread(begun.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    async with asyncio.timeout(10):
        await unlinked.wait()
    assert not (segments.FOLDER / offers[0].name).exists()


async def test_an_executor_that_starts_removes_what_a_killed_one_left():
    left = segments.FOLDER / f"penstock-{secrets.token_hex(16)}"
    left.touch(0o600)
    Transports()
    assert not left.exists()


async def test_executors_that_allow_nothing_in_common_say_so():
    sending, receiving = await settled((Transport.GRPC,), (Transport.SHARED_MEMORY,))
    with pytest.raises(TransportFailed, match="no transport"):
        await sending.put(memoryview(b"kv"))
    with pytest.raises(PayloadUnproven):
        await receiving.open(InlinePayload(b"kv"), checksum(b"kv"))
    sending.close()
    receiving.close()


async def test_a_host_without_shared_memory_offers_none_and_says_so_once(monkeypatch):
    def full(size, folder=segments.FOLDER):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segments, "create", full)
    transports = Transports()
    with capture_logs() as logs:
        for _ in range(3):
            assert (await transports.receiving(1 << 16, BOTH)).offer.shared is None
    assert [line["reason"] for line in logs] == ["[Errno 28] No space left on device"]


async def test_payload_in_the_message_is_checked_and_its_room_comes_back():
    sending, receiving = await settled((Transport.GRPC,))
    for _ in range(4):  # each as large as the window
        parcel = await sending.put(memoryview(bytes(1 << 16)))
        with pytest.raises(WrongChecksum):
            await receiving.open(parcel.payload, parcel.checksum ^ 1)
        sending.taken(parcel.payload)
    with pytest.raises(PayloadUnproven):
        await receiving.open(DevicePayload(b"?"), 0)
    sending.close()
    receiving.close()
    with pytest.raises(LinkClosed):
        await sending.put(memoryview(b"kv"))
    with pytest.raises(LinkClosed):
        await receiving.open(parcel.payload, parcel.checksum)
