"""Executors that could not hand KV over to each other a moment ago: such a pair is left alone for some time, and then tried again.

Both halves tell how many handoffs between them have failed since the last that succeeded. The pair is avoided for half a second
then, for twice as long whenever a trial fails, and for half a minute at most; one handoff that succeeds ends it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Unreached"]

_FIRST_SECONDS = 0.5
_LONGEST_SECONDS = 30.0
# One request at a time tries a pair again: what comes of it is known within the handoff's lease, and is told soon after.
_TRIAL_SECONDS = 5.0


@dataclass(slots=True)
class _Pair:
    """A sender that failed: failures as each half last told, and until when it is left alone."""

    failures: dict[str, int] = field(default_factory=dict)
    tries: int = 0
    until: float = 0.0
    tried_until: float = 0.0


class Unreached:
    """Those from which one executor could not receive KV, by executor id; times in monotonic seconds."""

    __slots__ = ("_pairs",)

    def __init__(self) -> None:
        self._pairs: dict[str, _Pair] = {}

    def hear(self, sender_id: str, half: str, failures: int, now: float) -> None:
        """One half tells of a sender, in each of its reports: failures in a row, of which 0 is a success."""
        pair = self._pairs.get(sender_id)
        before = 0 if pair is None else pair.failures.get(half, 0)
        if failures < before:
            del self._pairs[sender_id]
            pair, before = None, 0
        if failures == before:
            return
        if pair is None:
            pair = self._pairs[sender_id] = _Pair()
        pair.failures[half] = failures
        if now >= pair.until:  # else it failed before it was left alone, or the other half has told of the same
            pair.until = now + min(_FIRST_SECONDS * 2**pair.tries, _LONGEST_SECONDS)
            pair.tried_until = 0.0
            pair.tries += 1

    def avoids(self, sender_id: str, now: float) -> bool:
        """Whether nothing is to be received from there now."""
        pair = self._pairs.get(sender_id)
        return pair is not None and now < max(pair.until, pair.tried_until)

    def tries(self, sender_id: str, now: float) -> None:
        """A request is to receive from there."""
        if (pair := self._pairs.get(sender_id)) is not None:
            pair.tried_until = now + _TRIAL_SECONDS

    def forget(self, sender_id: str) -> None:
        """That executor has left."""
        self._pairs.pop(sender_id, None)
