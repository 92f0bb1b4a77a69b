"""A long-lived bidirectional stream to another service: one writer that joins what is pending, one reader, and a way back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import grpc
import grpc.aio

from penstock.common.channel import leave, why_ended
from penstock.common.logs import logger

__all__ = ["Peer", "Stream"]

Sent = TypeVar("Sent")
Received = TypeVar("Received")
Sent_co = TypeVar("Sent_co", covariant=True)
Received_contra = TypeVar("Received_contra", contravariant=True)

_FIRST_BACKOFF = 0.05
_LONGEST_BACKOFF = 1.0


class Peer(Protocol[Sent_co, Received_contra]):
    """What runs over a stream. All of it is called from the event loop and never waits."""

    def opened(self) -> None:
        """A new stream begins, whose other end knows nothing."""

    def received(self, message: Received_contra) -> None:
        """A message came."""

    def next_message(self) -> Sent_co | None:
        """All that is pending, as one message; None if nothing is."""

    def lost(self, why: str) -> None:
        """The stream is gone."""


class Stream(Generic[Sent, Received]):
    """Runs a `Peer` over streams that `call` opens. `wake` has the writer ask the peer for its next message.

    Args:
        name: of the other service, for logs.
        call: opens a stream.
        peer: what runs over it.
        forever: whether a lost stream is opened again, with growing pauses; otherwise `run` returns.
    """

    def __init__(
        self,
        name: str,
        call: Callable[[], grpc.aio.StreamStreamCall[Sent, Received]],
        peer: Peer[Sent, Received],
        *,
        forever: bool,
    ) -> None:
        self._name = name
        self._call = call
        self._peer = peer
        self._forever = forever
        self._pending = asyncio.Event()

    def wake(self) -> None:
        """Something is pending."""
        self._pending.set()

    async def run(self) -> None:
        """Keep the stream until it is lost, or for ever."""
        backoff = _FIRST_BACKOFF
        while True:
            heard, why = await self._run_once()
            self._peer.lost(why)
            if not self._forever:
                return
            logger().warning("stream lost", peer=self._name, why=why)
            backoff = _FIRST_BACKOFF if heard else min(backoff * 2, _LONGEST_BACKOFF)
            await asyncio.sleep(backoff)

    async def _run_once(self) -> tuple[bool, str]:
        """One stream, from its opening to its end: whether anything was heard on it, and why it ended."""
        call = self._call()
        self._peer.opened()
        self._pending.set()
        writer = asyncio.create_task(self._write(call))
        heard = False
        try:
            async for message in call:
                heard = True
                self._peer.received(message)
        except grpc.aio.AioRpcError as error:
            return heard, why_ended(error)
        except Exception as error:  # noqa: BLE001 - a peer that breaks the protocol is lost, and no more
            logger().error("stream broke", peer=self._name, exc_info=error)
            return heard, type(error).__name__
        finally:
            writer.cancel()
            leave(call)
            with contextlib.suppress(asyncio.CancelledError):
                await writer
        return heard, "the other end closed it"

    async def _write(self, call: grpc.aio.StreamStreamCall[Sent, Received]) -> None:
        # A write that fails ends the reader too, which tells why.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._pending.wait()
                self._pending.clear()
                message = self._peer.next_message()
                if message is not None:
                    await call.write(message)
