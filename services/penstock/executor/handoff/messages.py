"""Between messages and the handoff's plain words. Nothing that comes in is checked here, but for being a message at all."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.executor.handoff.framing import Request
from penstock.executor.handoff.ticket import Transport
from penstock.executor.handoff.transports.negotiation import Attachment, Offer
from penstock.executor.handoff.transports.port import DevicePayload, InlinePayload, Parcel, Payload, SharedPayload
from penstock.executor.handoff.transports.segments import SegmentOffer
from penstock.executor.handoff.words import (
    Abort,
    Aborted,
    Ack,
    Answer,
    Ask,
    Commit,
    Push,
    Pushed,
    Refusal,
    Refused,
    Release,
    Renew,
    Renewed,
    Reserve,
    Reserved,
)
from penstock.executor.messages import read_ticket, tell_ticket
from penstock.internal.v1 import handoff_pb2 as pb

__all__ = [
    "read_answer",
    "read_ask",
    "read_attach",
    "read_offer",
    "read_transports",
    "refusal_of",
    "tell_answer",
    "tell_ask",
    "tell_attach",
    "tell_segment",
    "tell_transports",
]

_REFUSALS = {
    Refusal.UNKNOWN: pb.HANDOFF_REFUSAL_UNKNOWN,
    Refusal.NOT_YOURS: pb.HANDOFF_REFUSAL_NOT_YOURS,
    Refusal.UNREGISTERED: pb.HANDOFF_REFUSAL_UNREGISTERED,
    Refusal.STALE_EPOCH: pb.HANDOFF_REFUSAL_STALE_EPOCH,
    Refusal.WRONG_MODEL: pb.HANDOFF_REFUSAL_WRONG_MODEL,
    Refusal.OUT_OF_RANGE: pb.HANDOFF_REFUSAL_OUT_OF_RANGE,
    Refusal.WRONG_SIZE: pb.HANDOFF_REFUSAL_WRONG_SIZE,
    Refusal.WRONG_DTYPE: pb.HANDOFF_REFUSAL_WRONG_DTYPE,
    Refusal.WRONG_CHECKSUM: pb.HANDOFF_REFUSAL_WRONG_CHECKSUM,
    Refusal.INCOMPLETE: pb.HANDOFF_REFUSAL_INCOMPLETE,
    Refusal.UNPROVEN: pb.HANDOFF_REFUSAL_UNPROVEN,
}
_REFUSALS_READ = {message: refusal for refusal, message in _REFUSALS.items()}
_TRANSPORTS = {
    Transport.GRPC: pb.HANDOFF_TRANSPORT_GRPC,
    Transport.SHARED_MEMORY: pb.HANDOFF_TRANSPORT_SHARED_MEMORY,
    Transport.NIXL: pb.HANDOFF_TRANSPORT_NIXL,
}
_TRANSPORTS_READ = {message: transport for transport, message in _TRANSPORTS.items()}


def tell_ask(word: Ask) -> Request:
    """What the prefill side says."""
    match word:
        case Reserve():
            return Request(pb.HandoffRequest(reserve=pb.Reserve(ticket=tell_ticket(word.ticket))))
        case Push():
            return _tell_push(word)
        case Commit():
            commit = pb.Commit(handoff_id=word.handoff_id, epoch=word.epoch, tokens=word.tokens, first_token_id=word.first_token_id)
            return Request(pb.HandoffRequest(commit=commit))
        case Renew():
            return Request(pb.HandoffRequest(renew=pb.Renew(handoff_ids=word.handoff_ids)))
        case Abort():
            return Request(pb.HandoffRequest(abort=pb.Abort(handoff_id=word.handoff_id, epoch=word.epoch, ended=word.ended)))
        case Release():
            return Request(pb.HandoffRequest(release=pb.Release(handoff_id=word.handoff_id, epoch=word.epoch)))


def read_ask(request: Request) -> Ask | None:  # noqa: PLR0911 - one for each word
    """The same, as it came; None: nothing that is said of a handoff."""
    message = request.message
    match message.WhichOneof("message"):
        case "reserve":
            return Reserve(read_ticket(message.reserve.ticket))
        case "push":
            return _read_push(message.push, request.inline)
        case "commit":
            commit = message.commit
            return Commit(commit.handoff_id, commit.epoch, commit.tokens, commit.first_token_id)
        case "renew":
            return Renew(tuple(message.renew.handoff_ids))
        case "abort":
            return Abort(message.abort.handoff_id, message.abort.epoch, message.abort.ended)
        case "release":
            return Release(message.release.handoff_id, message.release.epoch)
    return None


def _tell_push(push: Push) -> Request:
    message = pb.Push(
        handoff_id=push.handoff_id,
        epoch=push.epoch,
        first_token=push.tokens.start,
        tokens=len(push.tokens),
        form=pb.KV_FORM_NATIVE if push.native else pb.KV_FORM_CANONICAL,
        dtype=push.dtype,
        checksum=push.parcel.checksum,
    )
    match push.parcel.payload:
        case InlinePayload(data):
            return Request(pb.HandoffRequest(push=message), data)
        case SharedPayload(offset, size):
            message.shared.offset, message.shared.bytes = offset, size
        case DevicePayload(descriptor):
            message.device = descriptor
    return Request(pb.HandoffRequest(push=message))


def _read_push(push: pb.Push, inline: bytes | memoryview | None) -> Push:
    return Push(
        handoff_id=push.handoff_id,
        epoch=push.epoch,
        tokens=range(push.first_token, push.first_token + push.tokens),
        native=push.form == pb.KV_FORM_NATIVE,
        dtype=push.dtype,
        parcel=Parcel(_read_payload(push) if inline is None else InlinePayload(inline), push.checksum),
    )


def _read_payload(push: pb.Push) -> Payload:
    match push.WhichOneof("payload"):
        case "shared":
            return SharedPayload(push.shared.offset, push.shared.bytes)
        case "device":
            return DevicePayload(push.device)
    return InlinePayload(push.inline)


def tell_answer(word: Answer) -> pb.HandoffResponse:
    """What the decode side says."""
    match word:
        case Reserved():
            reserved = pb.Reserved(handoff_id=word.handoff_id, epoch=word.epoch, first_token=word.first_token)
            return pb.HandoffResponse(reserved=reserved)
        case Pushed():
            pushed = pb.Pushed(handoff_id=word.handoff_id, epoch=word.epoch, first_token=word.first_token)
            return pb.HandoffResponse(pushed=pushed)
        case Ack():
            return pb.HandoffResponse(ack=pb.Ack(handoff_id=word.handoff_id, epoch=word.epoch))
        case Renewed():
            return pb.HandoffResponse(renewed=pb.Renewed(handoff_ids=word.handoff_ids))
        case Aborted():
            return pb.HandoffResponse(aborted=pb.Aborted(handoff_id=word.handoff_id, epoch=word.epoch))
        case Refused():
            refused = pb.Refused(
                handoff_id=word.handoff_id,
                epoch=word.epoch,
                reason=_REFUSALS[word.reason],
                message=word.message,
                first_token=word.first_token,
            )
            return pb.HandoffResponse(refused=refused)


def read_answer(message: pb.HandoffResponse) -> Answer | None:  # noqa: PLR0911 - one for each word
    """The same, as it came; None: nothing that is said of a handoff."""
    match message.WhichOneof("message"):
        case "reserved":
            reserved = message.reserved
            return Reserved(reserved.handoff_id, reserved.epoch, reserved.first_token)
        case "pushed":
            return Pushed(message.pushed.handoff_id, message.pushed.epoch, message.pushed.first_token)
        case "ack":
            return Ack(message.ack.handoff_id, message.ack.epoch)
        case "renewed":
            return Renewed(tuple(message.renewed.handoff_ids))
        case "aborted":
            return Aborted(message.aborted.handoff_id, message.aborted.epoch)
        case "refused":
            refused = message.refused
            return Refused(refused.handoff_id, refused.epoch, refusal_of(refused.reason), refused.message, refused.first_token)
    return None


def refusal_of(reason: pb.HandoffRefusal.ValueType) -> Refusal:
    """One that a newer executor has, and this one does not know, is final."""
    return _REFUSALS_READ.get(reason, Refusal.UNKNOWN)


def tell_transports(transports: Iterable[Transport]) -> list[pb.HandoffTransport.ValueType]:
    """Those that an executor has."""
    return [_TRANSPORTS[transport] for transport in transports]


def read_transports(transports: Iterable[pb.HandoffTransport.ValueType]) -> list[Transport]:
    """Those of them that are known here."""
    return [_TRANSPORTS_READ[transport] for transport in transports if transport in _TRANSPORTS_READ]


def tell_segment(offer: Offer) -> pb.SharedSegment | None:
    """The shared memory that is offered."""
    shared = offer.shared
    return None if shared is None else pb.SharedSegment(name=shared.name, bytes=shared.size, proof=shared.proof)


def read_offer(welcome: pb.Welcome) -> Offer:
    """What the decode side has."""
    segment = welcome.shared_memory
    shared = SegmentOffer(segment.name, segment.bytes, segment.proof) if welcome.HasField("shared_memory") else None
    return Offer(welcome.window_bytes, shared, tuple(read_transports(welcome.transports)), welcome.nixl_agent)


def tell_attach(attachment: Attachment) -> Request:
    """The proof that a transport is shared."""
    return Request(pb.HandoffRequest(attach=pb.Attach(transport=_TRANSPORTS[attachment.transport], proof=attachment.proof)))


def read_attach(attach: pb.Attach) -> Attachment | None:
    """The same, as it came; None: by a transport that is not known here."""
    transport = _TRANSPORTS_READ.get(attach.transport)
    return None if transport is None else Attachment(transport, attach.proof)
