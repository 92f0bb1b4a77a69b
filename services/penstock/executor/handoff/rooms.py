"""Room for payload on a link: how much may be under way, and whose turn it is."""

from __future__ import annotations

from collections.abc import Callable

from penstock.executor.handoff.speed import LinkSpeed
from penstock.executor.handoff.transports.port import Payload
from penstock.executor.handoff.words import Aborted, Ack, Answer, Push, Pushed, Refusal, Refused, Reserved

__all__ = ["Rooms"]

_Key = tuple[bytes, int, int]


class Rooms:
    """Bytes that were copied out and not taken yet, of one stream; never more than the window.

    Payload has been told of by a Push, or is still being copied out. Its room comes back with the answer to the Push, or with one
    behind which the other side reads nothing of the handoff any more.

    Args:
        window_bytes: of all handoffs together.
        taken: told of payload that the other side has done with.
        speed: measures what goes and comes back.
    """

    def __init__(self, window_bytes: int, taken: Callable[[Payload], None], speed: LinkSpeed) -> None:
        self._free = window_bytes
        self._window = window_bytes
        self._taken = taken
        self._speed = speed
        self._pushes: dict[_Key, tuple[Payload, int]] = {}

    def has(self, size: int) -> bool:
        """Whether so many bytes may be copied out; alone on the link, any number."""
        return size <= self._free or self._free == self._window

    def take(self, size: int) -> None:
        """They are being copied out."""
        self._free -= size

    def give(self, size: int) -> None:
        """They will not be told of."""
        self._free += size

    def tell(self, push: Push, size: int, now: float) -> None:
        """They have been."""
        self._speed.pushed(size, now)
        self._pushes[push.handoff_id, push.epoch, push.tokens.start] = (push.parcel.payload, size)

    def hear(self, answer: Answer, now: float) -> bool:
        """Whether room has come back by an answer."""
        keys = self._done_by(answer)
        for key in keys:
            payload, size = self._pushes.pop(key)
            self._free += size
            self._speed.answered(size, now, arrived=isinstance(answer, Pushed))
            self._taken(payload)
        return bool(keys)

    def _done_by(self, answer: Answer) -> list[_Key]:
        match answer:
            case Refused(reason=Refusal.UNKNOWN) | Ack() | Aborted():
                return [key for key in self._pushes if key[0] == answer.handoff_id]
            case Pushed() | Refused():
                key = (answer.handoff_id, answer.epoch, answer.first_token)
                return [key] if key in self._pushes else []
            case Reserved():
                # What it had not begun to import it has dropped.
                return [
                    key
                    for key in self._pushes
                    if key[0] == answer.handoff_id and key[1] < answer.epoch and key[2] >= answer.first_token
                ]
        return []
