"""Which transport a link takes: the cheapest that its two ends have, allow, and have proven to share."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from penstock.common.heap import keep_freed_memory
from penstock.common.logs import logger
from penstock.executor.handoff.ticket import Transport
from penstock.executor.handoff.transports import segments
from penstock.executor.handoff.transports.inline import InlineIncoming, InlineOutgoing
from penstock.executor.handoff.transports.nixl import NixlIncoming, NixlOutgoing, missing
from penstock.executor.handoff.transports.port import (
    InlinePayload,
    LinkClosed,
    Outgoing,
    Parcel,
    Payload,
    PayloadUnproven,
    TransportFailed,
)
from penstock.executor.handoff.transports.shared_memory import SharedIncoming, SharedOutgoing

__all__ = ["Attachment", "Offer", "ReceivingEnds", "SendingEnds", "Transports"]

_CHEAPEST_FIRST = (Transport.SHARED_MEMORY, Transport.NIXL, Transport.GRPC)


_Proving = SharedIncoming | NixlIncoming
_A = ParamSpec("_A")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Offer:
    """What the receiving end has for this link.

    Attributes:
        transports: that it takes; each but gRPC has to be proven first.
        nixl: where NIXL finds its memory; empty where it offers none.
    """

    window_bytes: int
    shared: segments.SegmentOffer | None = None
    transports: tuple[Transport, ...] = _CHEAPEST_FIRST
    nixl: bytes = b""


@dataclass(frozen=True, slots=True)
class Attachment:
    """The sending end has reached what was offered: `proof` says so to the receiving end."""

    transport: Transport
    proof: bytes


class Transports:
    """What one executor has, and makes the ends of its links from."""

    def __init__(self, allowed: Sequence[Transport] = (Transport.SHARED_MEMORY, Transport.GRPC)) -> None:
        """`allowed`: what may be taken. Others are neither offered nor taken."""
        self._allowed = frozenset(allowed)
        self._warned: set[Transport] = set()
        if Transport.NIXL in self._allowed and (reason := missing()) is not None:
            self._warn_once(Transport.NIXL, reason)
            self._allowed -= {Transport.NIXL}
        if Transport.SHARED_MEMORY in self._allowed:
            segments.sweep()  # what an executor left that was killed here before

    @property
    def names(self) -> tuple[Transport, ...]:
        """Those that may be taken, the cheapest first."""
        return tuple(transport for transport in _CHEAPEST_FIRST if transport in self._allowed)

    async def receiving(self, window_bytes: int, theirs: Sequence[Transport]) -> ReceivingEnds:
        """The receiving ends of a new link to an executor that has `theirs`."""
        return await _made(self._receive, window_bytes, theirs)

    def _receive(self, window_bytes: int, theirs: Sequence[Transport]) -> ReceivingEnds:
        both = [transport for transport in self.names if transport in theirs]
        proving: dict[Transport, _Proving] = {}
        for transport, make in ((Transport.SHARED_MEMORY, SharedIncoming), (Transport.NIXL, NixlIncoming)):
            if transport in both:
                try:
                    proving[transport] = make(window_bytes)
                except (OSError, TransportFailed) as error:
                    self._warn_once(transport, str(error))
                    both.remove(transport)
        return ReceivingEnds(window_bytes, tuple(both), proving)

    def sending(self, offer: Offer) -> SendingEnds:
        """The sending ends of a link, where the other executor has offered this."""
        return SendingEnds(offer, self._allowed)

    def _warn_once(self, transport: Transport, reason: str) -> None:
        if transport not in self._warned:
            self._warned.add(transport)
            logger().warning("a transport of KV is not offered", transport=transport.value, reason=reason)


class ReceivingEnds:
    """The receiving end of a link, whichever transport a payload comes by. Until one is proven, that is gRPC."""

    def __init__(self, window_bytes: int, transports: tuple[Transport, ...], proving: dict[Transport, _Proving]) -> None:
        shared, nixl = proving.get(Transport.SHARED_MEMORY), proving.get(Transport.NIXL)
        self.offer = Offer(
            window_bytes,
            shared.offer if isinstance(shared, SharedIncoming) else None,
            transports,
            nixl.offer if isinstance(nixl, NixlIncoming) else b"",
        )
        self._unproven = proving
        self._proven: _Proving | None = None
        self._inline = InlineIncoming() if Transport.GRPC in transports else None

    @property
    def transport(self) -> Transport:
        """What was proven."""
        return self._proven.transport if self._proven else Transport.GRPC

    def attach(self, attachment: Attachment) -> bool:
        """Whether the other end's proof is right: payload may come this way from now on. One try for each."""
        end = self._unproven.pop(attachment.transport, None)
        if end is None:
            return False
        if self._proven is None and end.prove(attachment.proof):
            self._proven = end
            self._forget_unproven()
            return True
        end.close()
        return False

    async def open(self, payload: Payload, checksum: int) -> memoryview:
        """See `Incoming`."""
        self._forget_unproven()  # the other end has chosen, and would have said so before
        end = self._inline if isinstance(payload, InlinePayload) else self._proven
        if end is None:
            raise PayloadUnproven("the link has no such transport, or it was not proven")
        return await end.open(payload, checksum)

    def close(self) -> None:
        """See `Incoming`."""
        self._forget_unproven()
        for end in (self._proven, self._inline):
            if end is not None:
                end.close()

    def _forget_unproven(self) -> None:
        while self._unproven:
            self._unproven.popitem()[1].close()


class SendingEnds:
    """The sending end of a link. `attach` and `attached` settle the transport, before the first `put`."""

    def __init__(self, offer: Offer, allowed: frozenset[Transport]) -> None:
        keep_freed_memory()  # what is sent by any of them was copied out of the cache before, into memory that comes and goes
        self._offer = offer
        self._untried = [each for each in _CHEAPEST_FIRST if each in allowed and each in offer.transports]
        self._trying: SharedOutgoing | NixlOutgoing | None = None
        self._end: Outgoing | None = None
        self._closed = False

    @property
    def patience(self) -> float:
        """Seconds that settling may take beyond the other side's answers: NIXL's agents are slow to find each other."""
        return 10.0 if Transport.NIXL in self._untried else 0.0

    @property
    def transport(self) -> Transport:
        """What was settled on; gRPC before."""
        return self._end.transport if self._end else Transport.GRPC

    async def attach(self) -> Attachment | None:
        """The next proof to tell, the cheapest transport's first; None when the link is settled."""
        while self._end is None and self._untried and not self._closed:
            transport = self._untried.pop(0)
            if transport is Transport.GRPC:
                self._end = InlineOutgoing(self._offer.window_bytes)
                continue
            self._trying = await _made(_reach, transport, self._offer)
            if self._trying is not None and not self._closed:
                return Attachment(transport, self._trying.answer)
        if self._closed:
            self.close()  # while this looked
        return None

    def attached(self, *, accepted: bool) -> None:
        """The receiving end's word on the last proof."""
        if accepted and not self._closed:
            self._end, self._trying = self._trying, None
        elif self._trying is not None:
            self._trying.close()
            self._trying = None

    async def put(self, data: memoryview) -> Parcel:
        """See `Outgoing`."""
        if self._closed:
            raise LinkClosed("the link is closed")
        if self._end is None:
            raise TransportFailed("the two executors share no transport that both allow")
        return await self._end.put(data)

    def taken(self, payload: Payload) -> None:
        """See `Outgoing`."""
        if self._end is not None:
            self._end.taken(payload)

    def close(self) -> None:
        """See `Outgoing`."""
        self._closed = True
        for end in (self._trying, self._end):
            if end is not None:
                end.close()


def _reach(transport: Transport, offer: Offer) -> SharedOutgoing | NixlOutgoing | None:
    try:
        if transport is Transport.NIXL:
            return NixlOutgoing(offer.nixl) if offer.nixl else None
        segment = segments.attach(offer.shared) if offer.shared is not None else None
        return SharedOutgoing(segment) if segment is not None else None
    except (OSError, ValueError, TransportFailed) as error:
        logger().warning("a transport of KV that was offered is out of reach", transport=transport.value, reason=str(error))
        return None


async def _made(make: Callable[_A, _R], *given: _A.args, **named: _A.kwargs) -> _R:
    """What `make` makes in a thread. A thread can not be cancelled: what it makes for nobody is closed."""
    making = asyncio.get_running_loop().run_in_executor(None, functools.partial(make, *given, **named))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(_close)
        raise


def _close(made: asyncio.Future[Any]) -> None:
    end = None if made.exception() else made.result()
    if end is not None:
        end.close()
