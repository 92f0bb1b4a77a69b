"""Payload through shared memory: what is opened, what is refused, and that nothing of it is left."""

import asyncio
import gc
import os
import re
import stat
from pathlib import Path
from random import Random

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.executor.handoff.transports import segments
from penstock.executor.handoff.transports.port import (
    InlinePayload,
    LinkClosed,
    PayloadOutOfRange,
    PayloadUnproven,
    SharedPayload,
    WrongChecksum,
    checksum,
)
from penstock.executor.handoff.transports.shared_memory import SharedIncoming, SharedOutgoing

WINDOW = 1 << 16


def mapped():
    """Mappings of this process that are segments' (which are files without a name by then)."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if re.search(r"/dev/shm/(#|penstock-)", line)]


def names():
    return {path.name for path in segments.FOLDER.glob("penstock-*")}


@pytest.fixture
def ends():
    incoming = SharedIncoming(WINDOW)
    outgoing = SharedOutgoing(segments.attach(incoming.offer))
    assert incoming.prove(outgoing.answer)
    yield outgoing, incoming
    outgoing.close()
    incoming.close()


@given(st.lists(st.integers(1, WINDOW), min_size=1, max_size=12), st.integers(0, 1 << 32))
@settings(max_examples=25, deadline=None)
def test_bytes_come_out_as_they_went_in_whatever_the_order_of_taking(sizes, seed):
    async def scene():
        random = Random(seed)
        incoming = SharedIncoming(WINDOW)
        outgoing = SharedOutgoing(segments.attach(incoming.offer))
        incoming.prove(outgoing.answer)
        held = []

        async def take_one():
            parcel, data = held.pop(random.randrange(len(held)))
            assert bytes(await incoming.open(parcel.payload, parcel.checksum)) == data
            outgoing.taken(parcel.payload)

        for size in sizes:
            data = random.randbytes(size)
            putting = asyncio.create_task(outgoing.put(memoryview(data)))
            while not (await asyncio.wait([putting], timeout=None if not held else 0.001))[0]:
                await take_one()
            held.append((putting.result(), data))
        while held:
            await take_one()
        incoming.close()
        outgoing.close()

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("offset", "size"), [(-64, 128), (0, 0), (0, -1), (0, WINDOW + 1), (WINDOW, 1), (WINDOW - 64, 65), (1 << 62, 1)]
)
async def test_a_forged_range_is_refused(ends, offset, size):
    with pytest.raises(PayloadOutOfRange):
        await ends[1].open(SharedPayload(offset, size), 0)


async def test_bytes_that_are_others_are_refused(ends):
    outgoing, incoming = ends
    parcel = await outgoing.put(memoryview(b"kv" * 1000))
    with pytest.raises(WrongChecksum, match="2000 bytes"):
        await incoming.open(SharedPayload(parcel.payload.offset + 64, 2000), parcel.checksum)


async def test_payload_in_the_message_is_not_taken_for_shared(ends):
    with pytest.raises(PayloadUnproven):
        await ends[1].open(InlinePayload(b"kv"), checksum(b"kv"))


async def test_nothing_is_opened_before_the_proof_or_behind_a_wrong_one():
    incoming = SharedIncoming(WINDOW)
    outgoing = SharedOutgoing(segments.attach(incoming.offer))
    parcel = await outgoing.put(memoryview(b"kv"))
    for answer in (None, b"", incoming.offer.proof, bytes(32), outgoing.answer[:-1]):
        if answer is not None:
            assert not incoming.prove(answer)
        with pytest.raises(PayloadUnproven):
            await incoming.open(parcel.payload, parcel.checksum)
    assert incoming.prove(outgoing.answer)
    assert bytes(await incoming.open(parcel.payload, parcel.checksum)) == b"kv"
    outgoing.close()
    incoming.close()


async def test_a_view_outlives_the_link_and_memory_goes_with_it():
    gc.collect()  # what other tests' exceptions hold
    before, held = psutil.Process().num_fds(), set(mapped())
    incoming = SharedIncoming(WINDOW)
    outgoing = SharedOutgoing(segments.attach(incoming.offer))
    incoming.prove(outgoing.answer)
    parcel = await outgoing.put(memoryview(b"kv"))
    view = np.frombuffer(await incoming.open(parcel.payload, parcel.checksum), np.uint8)
    for end in (outgoing, incoming):
        end.close()
        end.close()
    assert view.tobytes() == b"kv"
    assert len(set(mapped()) - held) == 1
    del view
    assert set(mapped()) <= held
    assert psutil.Process().num_fds() <= before
    with pytest.raises(LinkClosed):
        await outgoing.put(memoryview(b"kv"))
    with pytest.raises(LinkClosed):
        await incoming.open(parcel.payload, parcel.checksum)


async def test_what_is_opened_can_not_be_written(ends):
    outgoing, incoming = ends
    parcel = await outgoing.put(memoryview(b"kv"))
    assert (await incoming.open(parcel.payload, parcel.checksum)).readonly


async def test_cancelled_puts_give_their_room_back(ends):
    outgoing, incoming = ends
    for _ in range(20):
        putting = asyncio.create_task(outgoing.put(memoryview(bytes(WINDOW))))
        await asyncio.sleep(0)
        putting.cancel()
    parcel = await outgoing.put(memoryview(bytes(WINDOW)))
    await incoming.open(parcel.payload, parcel.checksum)


class TestSegments:
    def test_its_name_is_there_until_the_other_end_has_attached(self):
        incoming = SharedIncoming(WINDOW)
        found = (segments.FOLDER / incoming.offer.name).stat()
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert re.fullmatch(r"penstock-[0-9a-f]{32}", incoming.offer.name)
        assert found.st_blocks * 512 >= WINDOW  # reserved, not promised
        outgoing = SharedOutgoing(segments.attach(incoming.offer))
        assert incoming.prove(outgoing.answer)
        assert incoming.offer.name not in names()
        assert segments.attach(incoming.offer) is None
        outgoing.close()
        incoming.close()

    def test_an_end_that_nobody_attached_to_leaves_nothing(self):
        incoming = SharedIncoming(WINDOW)
        incoming.close()
        assert incoming.offer.name not in names()

    @pytest.mark.parametrize(
        "name", ["../etc/passwd", "/etc/passwd", "penstock-", "penstock-" + "g" * 32, "penstock-" + "0" * 32 + "\n"]
    )
    def test_no_other_file_is_opened_for_one(self, name):
        with pytest.raises(ValueError, match="name"):
            segments.attach(segments.SegmentOffer(name, WINDOW, bytes(32)))

    def test_one_of_another_host_is_not_found(self):
        assert segments.attach(segments.SegmentOffer("penstock-" + "0" * 32, WINDOW, bytes(32))) is None

    def test_one_of_another_size_or_proof_is_not_taken(self):
        incoming = SharedIncoming(WINDOW)
        name, proof = incoming.offer.name, incoming.offer.proof
        with pytest.raises(ValueError, match="bytes"):
            segments.attach(segments.SegmentOffer(name, WINDOW * 2, proof))
        with pytest.raises(ValueError, match="proof"):
            segments.attach(segments.SegmentOffer(name, WINDOW, bytes(32)))
        (segments.FOLDER / name).chmod(0o666)
        with pytest.raises(ValueError, match="open to others"):
            segments.attach(incoming.offer)
        incoming.close()

    def test_a_link_in_its_place_is_not_followed(self, tmp_path):
        _, offer = made = segments.create(WINDOW, tmp_path)
        (tmp_path / offer.name).rename(tmp_path / "elsewhere")
        (tmp_path / offer.name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="symbolic"):
            segments.attach(offer, tmp_path)
        del made

    def test_sweeping_removes_what_nobody_holds_and_nothing_else(self, tmp_path):
        held, offer = segments.create(WINDOW, tmp_path)
        dead, other = tmp_path / ("penstock-" + "0" * 32), tmp_path / "penstock-notes"
        dead.touch()
        other.touch()
        assert segments.sweep(tmp_path) == 1
        assert {path.name for path in tmp_path.iterdir()} == {offer.name, other.name}
        held.close()
        assert segments.sweep(tmp_path) == 1
        assert segments.sweep(tmp_path / "absent") == 0

    def test_making_one_sweeps(self, tmp_path):
        (tmp_path / ("penstock-" + "0" * 32)).touch()
        segment, offer = segments.create(WINDOW, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [offer.name]
        segment.close()

    def test_one_that_is_larger_than_the_file_system_is_refused_and_leaves_nothing(self):
        whole, held = os.statvfs(segments.FOLDER), set(mapped())
        with pytest.raises(OSError, match="No space"):
            segments.create((whole.f_blocks + 1) * whole.f_frsize)
        assert set(mapped()) <= held
