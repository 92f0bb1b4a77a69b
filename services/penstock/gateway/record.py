"""How a request has run so far: where, since when, and what was done about losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from penstock.common.placement import PlacementReason
from penstock.gateway.answer import Fallback, FallbackReason, Handoff
from penstock.gateway.ports import SequenceStart

if TYPE_CHECKING:
    from penstock.gateway.choice import Choice

__all__ = ["Record"]


class Record:
    """Times are of the request's clock, in seconds.

    Attributes:
        begun: when it was encoded and first asked for a place.
        arrived: when it came to the door.
        first_text_at: when the client was first told anything.
        executor_ids: where it ran, in the order of the starts.
        lost_on: executors that it was lost on.
        prefill_executor_id: that computed the prompt last.
        placements: whether each lease was for a prefill apart, and why or why not.
        fallbacks: what was done about losses, why, and when.
        scheduler_seconds: in the queue of the scheduler.
        reserved: from when to when blocks for KV were waited for.
        arrivals: of KV, and when each was told.
    """

    def __init__(self, choices: Sequence[Choice], begun: float, arrived: float) -> None:
        self.begun = begun
        self.arrived = arrived
        self.placed_at: float | None = None
        self.first_token_at: float | None = None
        self.first_text_at: float | None = None
        self.second_token_at: float | None = None
        self.last_token_at: float | None = None
        self.executor_ids: list[str] = []
        self.lost_on: list[str] = []
        self.prefill_executor_id = ""
        self.decode_executor_id = ""
        self.placements: list[tuple[bool, PlacementReason]] = []
        self.fallbacks: list[tuple[Fallback, FallbackReason, float]] = []
        self.scheduler_seconds = 0.0
        self.reserved: list[tuple[float, float]] = []
        self.arrivals: list[tuple[float, Handoff]] = []
        self._choices = choices
        self._to_first_token = (0.0, 0.0)

    def first_token(self, choice: Choice, now: float) -> None:
        """A choice's first token has come. Where it is the first of all, that choice's waits and prefill were the way to it."""
        if self.first_token_at is None:
            self.first_token_at = now
            start = choice.start or SequenceStart(0, 0.0, 0.0)
            self._to_first_token = self.scheduler_seconds + choice.reserve_seconds + start.waited_seconds, start.prefill_seconds

    @property
    def replacements(self) -> int:
        """How often it was placed again."""
        return sum(fallback is Fallback.REPLACED for fallback, _, _ in self.fallbacks)

    @property
    def queue_seconds(self) -> float:
        """Time at the scheduler, for each placement, and the longest of the choices' for blocks and before the first step."""
        waits = (c.reserve_seconds + c.start.waited_seconds for c in self._choices if c.start is not None)
        return self.scheduler_seconds + max(waits, default=0.0)

    @property
    def prefill_seconds(self) -> float:
        """The longest of the choices' prefills."""
        return max((c.start.prefill_seconds for c in self._choices if c.start is not None), default=0.0)

    @property
    def encode_seconds(self) -> float:
        """From arrival to the first question for a place."""
        return self.begun - self.arrived

    @property
    def first_token_seconds(self) -> float | None:
        """From arrival to the first token; None before that."""
        return None if self.first_token_at is None else self.first_token_at - self.arrived

    @property
    def first_text_seconds(self) -> float | None:
        """From arrival to what the client was told first; None before that."""
        return None if self.first_text_at is None else self.first_text_at - self.arrived

    @property
    def parts(self) -> dict[str, float]:
        """What has passed until the first text, by part, and the step and the KV behind the first token.

        Queue and prefill are those of the choice whose first token came first. Other services tell how long they took, and not
        when: what is left of the time to that token is the hops between them, with attempts that were lost. It is less than 0 only
        by as much as the clocks of two processes differ in speed.
        """
        if self.first_token_at is None:
            return {}
        queue, prefill = self._to_first_token
        hops = self.first_token_at - self.begun - queue - prefill
        parts = {"encode": self.encode_seconds, "queue": queue, "prefill": prefill, "hops": hops}
        if self.first_text_at is not None:
            parts["text"] = self.first_text_at - self.first_token_at
        if self.first_step_seconds is not None:
            parts["first_step"] = self.first_step_seconds
        if self.arrivals:
            parts["transfer"] = sum(arrival.exposed_seconds for _, arrival in self.arrivals)
        return parts

    @property
    def first_step_seconds(self) -> float | None:
        """From the first token to the second; None before that."""
        if self.first_token_at is None or self.second_token_at is None:
            return None
        return self.second_token_at - self.first_token_at

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the first of its choices found in a prefix cache; the prompt counts once, too."""
        return next((c.start.cached_tokens for c in self._choices if c.start is not None), 0)
