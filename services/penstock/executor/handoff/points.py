"""The fault points that messages of a handoff pass: handoff.push.sent, handoff.push.received, and so for each kind of message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, TypeVar

from penstock.common import faults
from penstock.common.faults import Action
from penstock.executor.handoff.transports.port import InlinePayload, Parcel
from penstock.executor.handoff.words import Answer, Ask, Push, Renew, Renewed, Reserve

__all__ = ["passed"]

W = TypeVar("W", bound=Ask | Answer)


def passed(message: W, where: Literal["sent", "received"], peer: str) -> Iterable[W]:
    """What becomes of a message at its point; itself, unless a test has it otherwise. `peer`: the other executor."""
    if not faults.armed():
        return (message,)
    return faults.through(f"handoff.{type(message).__name__.lower()}.{where}", message, _alter, lane=(peer, where))


def _alter(action: Action, message: Any) -> Any:
    """A copy from an epoch before, or with a bit turned over: of the payload, or of the id of the handoff that is meant."""
    if action is Action.STALE:
        return replace(message, epoch=message.epoch - 1) if hasattr(message, "epoch") else message
    match message:
        case Push(parcel=Parcel(payload=InlinePayload(data=data)) as parcel) if data:
            flipped = bytearray(data)
            flipped[len(flipped) // 2] ^= 1
            return replace(message, parcel=replace(parcel, payload=InlinePayload(bytes(flipped))))
        case Push(parcel=parcel):  # the bytes lie in memory that both have: what is told of them does not fit either way
            return replace(message, parcel=replace(parcel, checksum=parcel.checksum ^ 1))
        case Renew(handoff_ids=ids) | Renewed(handoff_ids=ids):
            return replace(message, handoff_ids=tuple(map(_flipped, ids)))
        case Reserve(ticket=ticket):
            return replace(message, ticket=replace(ticket, handoff_id=_flipped(ticket.handoff_id)))
        case _:
            return replace(message, handoff_id=_flipped(message.handoff_id))


def _flipped(handoff_id: bytes) -> bytes:
    return bytes([handoff_id[0] ^ 1]) + handoff_id[1:]
