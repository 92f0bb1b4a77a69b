"""KV handed from one executor to another over real gRPC."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from executor_pair import executor, executor_pair, hand_over
from handoff_peer import HandPeer, payload

from penstock.backends.fake import next_token
from penstock.common.channel import connect
from penstock.common.proofs import proof
from penstock.executor.handoff import link, seats
from penstock.executor.handoff.geometry import Geometry
from penstock.executor.handoff.transports import segments, sizes
from penstock.executor.handoff.words import Refusal
from penstock.internal.v1 import executor_pb2 as pb
from penstock.internal.v1 import handoff_pb2

PROMPT = list(range(100))


def expected(described, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, described.vocabulary_size))
    return ids[len(prompt) :]


def block_bytes(side, tokens):
    """Of whole blocks, as the cache has them."""
    kv = side.server._loaded.model.kv
    return -(-tokens // kv.block_size) * kv.bytes_per_block


async def receiving(decode, sequence_id=1, prefill_executor_id="hand", max_tokens=5):
    """A sequence that waits for KV: its ticket."""
    await decode.start(sequence_id, PROMPT, max_tokens, receive=pb.ReceiveKv(prefill_executor_id=prefill_executor_id))
    await decode.until(lambda: sequence_id in decode.tickets)
    return decode.tickets[sequence_id]


@asynccontextmanager
async def hand_peer(**settings):
    """A decode executor, and a prefill executor that says what the test tells it to; both know each other."""
    async with executor(**settings) as decode, connect(decode.description.address) as channel:
        peer = HandPeer(decode, channel)
        peer.register()
        yield peer, decode, channel


async def finish(peer, decode, ticket, epoch=1, first=0):
    """Send what is missing, and see that the sequence decodes as if it had been computed here."""
    first_token, *rest = expected(decode.description, PROMPT, 5)
    if first < len(PROMPT):
        await peer.push(ticket, PROMPT, first, len(PROMPT), epoch)
    ack = await peer.commit(ticket, first_token, epoch)
    assert isinstance(ack, handoff_pb2.Ack)
    await decode.until(lambda: 1 in decode.finished)
    assert decode.tokens[1] == dict(enumerate(rest, start=1))
    await decode.idle()


async def test_a_sequence_is_prefilled_by_one_executor_and_decoded_by_the_other():
    async with executor_pair() as (prefill, decode):
        prompt = list(range(200))
        tokens = await hand_over(prefill, decode, 1, prompt, 8)
        assert tokens == expected(decode.description, prompt, 8)
        assert prefill.finished[1].reason == pb.SEQUENCE_FINISH_HANDED_OFF
        assert decode.finished[1].reason == pb.SEQUENCE_FINISH_LENGTH
        assert prefill.tokens[1].keys() == {0}
        arrival = decode.arrived[1]
        assert arrival.transport == handoff_pb2.HANDOFF_TRANSPORT_SHARED_MEMORY
        assert arrival.native
        assert arrival.kv_bytes == block_bytes(decode, 200)
        await asyncio.gather(prefill.idle(), decode.idle())


async def test_many_sequences_share_one_stream_and_what_is_cached_is_not_sent_again():
    async with executor_pair(handoff_push_mib=0.002, handoff_window_mib=0.01) as (prefill, decode):
        prompts = {i: [i] * 40 + list(range(50 * i % 300)) for i in range(1, 13)}
        for i, prompt in prompts.items():
            await decode.start(i, prompt, 4, receive=pb.ReceiveKv(prefill_executor_id=prefill.id))
        await decode.until(lambda: decode.tickets.keys() == prompts.keys())
        for i, prompt in prompts.items():
            await prefill.start(i, prompt, 4, send=pb.SendKv(ticket=decode.tickets[i]))
        await asyncio.gather(
            prefill.until(lambda: prefill.finished.keys() == prompts.keys()),
            decode.until(lambda: decode.finished.keys() == prompts.keys()),
        )
        for i, prompt in prompts.items():
            assert prefill.tokens[i] | decode.tokens[i] == dict(enumerate(expected(decode.description, prompt, 4)))
        await hand_over(prefill, decode, 20, [*prompts[5], 1, 2, 3], 4)
        assert decode.tickets[20].cached_tokens > 0
        wanted = len(prompts[5]) + 3 - decode.tickets[20].cached_tokens
        assert decode.arrived[20].kv_bytes == block_bytes(decode, wanted)
        assert len(decode.handoffs.receiving._streams) == 1
        await asyncio.gather(prefill.idle(), decode.idle())


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("transport", ["shared_memory", "grpc"])
@pytest.mark.parametrize("window", [0.00005, 0.00002], ids=["a token fits", "none does"])
async def test_a_block_that_is_larger_than_the_window_goes_over_all_the_same(monkeypatch, transport, native, window):
    monkeypatch.setattr(Geometry, "agrees", lambda geometry, layout: native)
    small = {"handoff_push_mib": 0.00002, "handoff_window_mib": window, "handoff_transports": (transport, "grpc")}
    async with executor_pair(**small) as (prefill, decode):
        assert block_bytes(decode, 1) > decode.handoffs.settings.window_bytes
        assert await hand_over(prefill, decode, 1, PROMPT, 5) == expected(decode.description, PROMPT, 5)
        assert prefill.finished[1].reason == pb.SEQUENCE_FINISH_HANDED_OFF
        assert decode.arrived[1].native == native
        await asyncio.gather(prefill.idle(), decode.idle())


@pytest.mark.parametrize(("transport", "native"), [("shared_memory", True), ("grpc", False)])
async def test_a_block_that_no_message_of_grpc_holds_goes_over_it_in_canonical_form(monkeypatch, transport, native):
    async with executor_pair(handoff_transports=(transport, "grpc")) as (prefill, decode):
        monkeypatch.setattr(sizes, "MAX_MESSAGE_BYTES", (1 << 20) + block_bytes(decode, 1) - 1)
        assert await hand_over(prefill, decode, 1, PROMPT, 5) == expected(decode.description, PROMPT, 5)
        assert decode.arrived[1].native == native
        await asyncio.gather(prefill.idle(), decode.idle())


async def test_an_answer_of_one_token_ends_where_it_was_prefilled():
    async with executor_pair() as (prefill, decode):
        assert await hand_over(prefill, decode, 1, PROMPT, 1) == expected(decode.description, PROMPT, 1)
        assert prefill.finished[1].reason == pb.SEQUENCE_FINISH_LENGTH
        await asyncio.gather(prefill.idle(), decode.idle())
        assert not decode.finished
        assert (prefill.handoffs.counts.sent, decode.handoffs.counts.received) == ({"ended": 1}, {"ended": 1})


async def test_streams_that_should_not_be_are_refused():
    async with hand_peer() as (peer, decode, channel):
        ticket = await receiving(decode)
        wrong = {
            handoff_pb2.HANDOFF_REFUSAL_UNREGISTERED: {"executor_id": "nobody"},
            handoff_pb2.HANDOFF_REFUSAL_NOT_YOURS: {"decode_executor_id": "another"},
            handoff_pb2.HANDOFF_REFUSAL_WRONG_MODEL: {"model_fingerprint": "another version"},
        }
        for reason, fields in wrong.items():
            stranger = HandPeer(decode, channel)
            assert (await stranger.introduce(**fields)).reason == reason
            assert await stranger.call.read() is grpc.aio.EOF
        assert decode.handoffs.counts.refusals == {
            Refusal.UNREGISTERED: 1,
            Refusal.NOT_YOURS: 1,
            Refusal.WRONG_MODEL: 1,
        }
        await peer.introduce()
        assert (await peer.reserve(ticket)).epoch == 1
        await finish(peer, decode, ticket)


async def test_a_stream_in_another_executors_name_is_refused_and_its_own_goes_on():
    async with hand_peer() as (peer, decode, channel):
        ticket = await receiving(decode)
        await peer.introduce()
        await peer.reserve(ticket)
        peer.register("thief")
        # What it has for itself, what it knows of others, and nothing.
        for shown in (proof(decode.secret, "thief"), proof(bytes(32), "hand"), decode.id.encode(), b""):
            stranger = HandPeer(decode, channel)
            refused = await stranger.introduce(proof=shown, transports=[handoff_pb2.HANDOFF_TRANSPORT_SHARED_MEMORY])
            assert refused.reason == handoff_pb2.HANDOFF_REFUSAL_UNREGISTERED
            assert await stranger.call.read() is grpc.aio.EOF
        await finish(peer, decode, ticket)


async def test_an_executor_has_one_stream_and_one_segment():
    async with hand_peer() as (peer, decode, channel):
        shared = {"transports": [handoff_pb2.HANDOFF_TRANSPORT_SHARED_MEMORY]}
        first = (await peer.introduce(**shared)).shared_memory
        assert (segments.FOLDER / first.name).exists()
        again = HandPeer(decode, channel)
        second = (await again.introduce(**shared)).shared_memory
        assert not (segments.FOLDER / first.name).exists()
        assert (segments.FOLDER / second.name).exists()
        assert await peer.call.read() is grpc.aio.EOF


async def test_streams_that_do_not_say_whose_they_are_are_few_and_end(monkeypatch):
    monkeypatch.setattr(seats, "_MOST_STRANGERS", 1)
    monkeypatch.setattr(seats, "_PATIENCE_SECONDS", 2.0)
    async with hand_peer() as (peer, decode, channel):
        codes = {await silent.call.code() for silent in (peer, HandPeer(decode, channel))}
        assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED}
        await HandPeer(decode, channel).introduce()


async def test_tickets_are_refused_that_were_forged_changed_minted_for_another_or_used():
    async with hand_peer() as (peer, decode, channel):
        ticket = await receiving(decode)
        await peer.introduce()
        assert (await peer.reserve(ticket, handoff_id=bytes(16))).reason == handoff_pb2.HANDOFF_REFUSAL_UNKNOWN
        assert (await peer.reserve(ticket, tokens=1000)).reason == handoff_pb2.HANDOFF_REFUSAL_UNKNOWN
        thief = HandPeer(decode, channel, "thief")
        peer.register("thief")
        await thief.introduce()
        for answer in (await thief.reserve(ticket), await thief.push(ticket, PROMPT, 0, 32), await thief.commit(ticket, 1)):
            assert answer.reason == handoff_pb2.HANDOFF_REFUSAL_NOT_YOURS
        await thief.say(abort=handoff_pb2.Abort(handoff_id=ticket.handoff_id))
        assert (await thief.hear()).reason == handoff_pb2.HANDOFF_REFUSAL_NOT_YOURS
        assert (await peer.reserve(ticket)).first_token == 0
        await finish(peer, decode, ticket)
        # Used up: the same answer while it is remembered, and none after it was let go.
        assert isinstance(await peer.reserve(ticket), handoff_pb2.Ack)
        assert isinstance(await peer.commit(ticket, 5), handoff_pb2.Ack)
        await peer.say(release=handoff_pb2.Release(handoff_id=ticket.handoff_id))
        assert (await peer.reserve(ticket)).reason == handoff_pb2.HANDOFF_REFUSAL_UNKNOWN


async def test_pushes_that_are_wrong_are_refused_and_harm_nothing():
    async with hand_peer() as (peer, decode, _):
        ticket = await receiving(decode)
        await peer.introduce()
        await peer.reserve(ticket)
        short = payload(PROMPT[:31])
        wrong = [
            (handoff_pb2.HANDOFF_REFUSAL_STALE_EPOCH, (0, 32), {"epoch": 0}),
            (handoff_pb2.HANDOFF_REFUSAL_STALE_EPOCH, (0, 32), {"epoch": 2}),
            (handoff_pb2.HANDOFF_REFUSAL_OUT_OF_RANGE, (32, 64), {}),
            (handoff_pb2.HANDOFF_REFUSAL_OUT_OF_RANGE, (0, 0), {}),
            (handoff_pb2.HANDOFF_REFUSAL_OUT_OF_RANGE, (0, 32), {"tokens": 2**32 - 1}),
            (handoff_pb2.HANDOFF_REFUSAL_WRONG_SIZE, (0, 32), {"inline": short}),
            (handoff_pb2.HANDOFF_REFUSAL_WRONG_SIZE, (0, 32), {"inline": b""}),
            (handoff_pb2.HANDOFF_REFUSAL_WRONG_SIZE, (0, 32), {"dtype": "float16"}),
            (handoff_pb2.HANDOFF_REFUSAL_WRONG_DTYPE, (0, 32), {"dtype": "int8"}),
            (handoff_pb2.HANDOFF_REFUSAL_WRONG_DTYPE, (0, 32), {"dtype": ""}),
            (handoff_pb2.HANDOFF_REFUSAL_WRONG_DTYPE, (0, 32), {"form": handoff_pb2.KV_FORM_NATIVE}),
            (handoff_pb2.HANDOFF_REFUSAL_WRONG_CHECKSUM, (0, 32), {"checksum": 1}),
        ]
        for reason, (first, end), fields in wrong:
            answer = await peer.push(ticket, PROMPT, first, end, **fields)
            assert (answer.reason, answer.handoff_id) == (reason, ticket.handoff_id), (reason, fields)
        shared = handoff_pb2.SharedRange(offset=0, bytes=len(payload(PROMPT[:32])))
        await peer.say(push=handoff_pb2.Push(handoff_id=ticket.handoff_id, epoch=1, tokens=32, dtype="float32", shared=shared))
        assert (await peer.hear()).reason == handoff_pb2.HANDOFF_REFUSAL_UNPROVEN
        assert sum(decode.handoffs.counts.refusals.values()) == len(wrong) + 1
        await finish(peer, decode, ticket)


async def test_commits_that_are_wrong_are_refused_and_the_right_one_counts():
    async with hand_peer() as (peer, decode, _):
        ticket = await receiving(decode)
        await peer.introduce()
        await peer.reserve(ticket)
        await peer.push(ticket, PROMPT, 0, 64)
        wrong = {
            handoff_pb2.HANDOFF_REFUSAL_INCOMPLETE: {},
            handoff_pb2.HANDOFF_REFUSAL_OUT_OF_RANGE: {"tokens": 64},
            handoff_pb2.HANDOFF_REFUSAL_STALE_EPOCH: {"epoch": 7},
        }
        for reason, fields in wrong.items():
            assert (await peer.commit(ticket, 3, **fields)).reason == reason
        beyond = decode.description.vocabulary_size
        assert (await peer.commit(ticket, beyond)).reason == handoff_pb2.HANDOFF_REFUSAL_OUT_OF_RANGE
        # What is doubled is answered again, and not imported again.
        assert isinstance(await peer.push(ticket, PROMPT, 0, 64), handoff_pb2.Pushed)
        await finish(peer, decode, ticket, first=64)
        assert decode.arrived[1].kv_bytes == len(PROMPT) * decode.description.kv_bytes_per_token


async def write_only(peer, renew, times):
    for _ in range(times):
        await peer.say(renew=renew)


async def test_a_stream_whose_answers_nobody_reads_is_ended():
    async with hand_peer() as (flood, decode, channel):
        ticket = await receiving(decode)
        await flood.introduce()
        # Each of these is answered with a refusal; the first of them fill what the connection buffers.
        with pytest.raises((grpc.aio.AioRpcError, asyncio.InvalidStateError)):
            await write_only(flood, handoff_pb2.Renew(handoff_ids=[bytes(16)] * 100), 400)
        # It goes on over another stream.
        again = HandPeer(decode, channel)
        await again.introduce()
        assert (await again.reserve(ticket)).epoch == 1
        await finish(again, decode, ticket)


async def test_a_handoff_goes_on_over_another_stream_where_it_was():
    async with hand_peer() as (peer, decode, channel):
        ticket = await receiving(decode)
        await peer.introduce()
        await peer.reserve(ticket)
        await peer.push(ticket, PROMPT, 0, 64)
        peer.call.cancel()
        again = HandPeer(decode, channel)
        await again.introduce()
        reserved = await again.reserve(ticket)
        assert (reserved.epoch, reserved.first_token) == (2, 64)
        assert (await again.push(ticket, PROMPT, 64, 100, 1)).reason == handoff_pb2.HANDOFF_REFUSAL_STALE_EPOCH
        await finish(again, decode, ticket, epoch=2, first=64)
        assert decode.arrived[1].resumptions == 1


async def test_a_handoff_ends_a_lease_after_the_other_side_has_fallen_silent():
    async with hand_peer(handoff_lease_seconds=0.3) as (peer, decode, _):
        ticket = await receiving(decode)
        await peer.introduce()
        await peer.reserve(ticket)
        await peer.push(ticket, PROMPT, 0, 64)
        await decode.until(lambda: 1 in decode.finished)
        assert decode.finished[1].reason == pb.SEQUENCE_FINISH_HANDOFF_FAILED
        assert decode.finished[1].handoff_failure == pb.HANDOFF_FAILURE_LEASE_EXPIRED
        assert isinstance(await peer.hear(), handoff_pb2.Aborted)
        await decode.idle()


async def test_an_executor_that_the_scheduler_does_not_name_is_never_dialled():
    async with executor_pair(handoff_lease_seconds=0.3) as (prefill, decode):
        prefill.know()
        await hand_over(prefill, decode, 1, PROMPT, 5)
        assert prefill.finished[1].handoff_failure == pb.HANDOFF_FAILURE_UNKNOWN_PEER
        assert decode.finished[1].handoff_failure == pb.HANDOFF_FAILURE_LEASE_EXPIRED
        await asyncio.gather(prefill.idle(), decode.idle())


async def test_executors_of_different_versions_exchange_nothing():
    async with executor_pair() as (prefill, decode):
        links = prefill.server._exchange._links
        links._identity = replace(links._identity, model_fingerprint="an older version")
        await decode.start(1, PROMPT, 5, receive=pb.ReceiveKv(prefill_executor_id=prefill.id))
        await decode.until(lambda: 1 in decode.tickets)
        await prefill.start(1, PROMPT, 5, send=pb.SendKv(ticket=decode.tickets[1]))
        await prefill.until(lambda: 1 in prefill.finished)
        assert prefill.finished[1].handoff_failure == pb.HANDOFF_FAILURE_INCOMPATIBLE
        await prefill.idle()


async def test_a_ticket_is_used_once_on_the_side_that_prefills_too():
    async with executor_pair() as (prefill, decode):
        await hand_over(prefill, decode, 1, PROMPT, 5)
        await prefill.start(2, PROMPT, 5, send=pb.SendKv(ticket=decode.tickets[1]))
        await prefill.until(lambda: 2 in prefill.finished)
        assert prefill.finished[2].handoff_failure == pb.HANDOFF_FAILURE_REFUSED
        stolen = handoff_pb2.HandoffTicket()
        stolen.CopyFrom(decode.tickets[1])
        stolen.prefill_executor_id = "another"
        await prefill.start(3, PROMPT, 5, send=pb.SendKv(ticket=stolen))
        await prefill.until(lambda: 3 in prefill.finished)
        assert prefill.finished[3].handoff_failure == pb.HANDOFF_FAILURE_REFUSED
        await asyncio.gather(prefill.idle(), decode.idle())


async def test_a_stream_that_nobody_needs_is_closed_and_opened_again_when_it_is_needed(monkeypatch):
    monkeypatch.setattr(link, "_IDLE_SECONDS", 0.05)
    async with asyncio.timeout(30), executor_pair() as (prefill, decode):
        await hand_over(prefill, decode, 1, PROMPT, 5)
        while decode.handoffs.receiving._streams or prefill.server._exchange._links._tasks:
            await decode.state()
        await hand_over(prefill, decode, 2, PROMPT[::-1], 5)
        assert prefill.finished[2].reason == pb.SEQUENCE_FINISH_HANDED_OFF
