"""Whom this executor may exchange KV with, by the scheduler's word alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Peer", "Peers"]


@dataclass(frozen=True, slots=True)
class Peer:
    """Another executor of the same model.

    Attributes:
        address: HOST:PORT of its services.
        proof: what this executor has to show it; empty where it only takes streams from it.
    """

    executor_id: str
    address: str
    model_fingerprint: str
    proof: bytes = field(default=b"", repr=False)


class Peers:
    """The scheduler's last word, which holds while the scheduler is away. Of one event loop."""

    def __init__(self) -> None:
        self._peers: dict[str, Peer] = {}
        self._changed = asyncio.Event()

    def update(self, peers: Iterable[Peer], *, more: bool = False) -> None:
        """These, and no others but where the scheduler says that there may be `more`: then those that were known stay."""
        self._peers = (self._peers if more else {}) | {peer.executor_id: peer for peer in peers}
        self._changed.set()
        self._changed = asyncio.Event()

    def get(self, executor_id: str) -> Peer | None:
        """None where the scheduler does not name it."""
        return self._peers.get(executor_id)

    async def change(self) -> None:
        """Wait for the scheduler's next word."""
        await self._changed.wait()
