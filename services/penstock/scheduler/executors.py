"""Executors as the scheduler keeps them, and what is leased on each."""

from __future__ import annotations

from penstock.scheduler.model import Description, Load

__all__ = ["Executor", "Hold"]


class Hold:
    """What is leased on one executor. Leases announced to a new scheduler stand here before the executor has registered."""

    __slots__ = ("executor_id", "leases", "sequences", "tokens")

    def __init__(self, executor_id: str) -> None:
        self.executor_id = executor_id
        self.leases = 0
        self.sequences = 0
        self.tokens = 0

    def add(self, sequences: int, tokens: int) -> None:
        """One lease more."""
        self.leases += 1
        self.sequences += sequences
        self.tokens += tokens

    def subtract(self, sequences: int, tokens: int) -> None:
        """One lease less."""
        self.leases -= 1
        self.sequences -= sequences
        self.tokens -= tokens


class Executor:
    """One registered executor.

    Attributes:
        bit: its bit in the prefix index.
        limit: sequences it is given at most.
        fresh_tokens: prompt tokens to prefill that were leased after its last report.
        foreign: sequences that it reports beyond the leases known here, such as those of gateways that have not announced yet. Two
            reports in a row have to tell of them: one alone may have crossed the releases of sequences that had just ended.
        slowness: how many times longer than the model's fastest executor it takes for a token of prefill.
    """

    __slots__ = (
        "_excess",
        "bit",
        "description",
        "draining",
        "expires",
        "foreign",
        "fresh_tokens",
        "hold",
        "kv_sequence",
        "kv_tokens",
        "limit",
        "load",
        "sequence_tokens",
        "slowness",
    )

    def __init__(self, description: Description, hold: Hold, *, bit: int, look_ahead: int, expires: float) -> None:
        self.description = description
        self.hold = hold
        self.bit = bit
        self.limit = description.max_batch_size + look_ahead
        self.kv_tokens = description.kv_tokens
        self.sequence_tokens = description.sequence_tokens
        self.expires = expires
        self.draining = False
        self.load = Load()
        self.fresh_tokens = 0
        self.foreign = 0
        self._excess: int | None = None
        self.slowness = 1.0
        self.kv_sequence: int | None = None

    def report(self, load: Load) -> None:
        """Take over what the executor tells of itself."""
        self.load = load
        self.fresh_tokens = 0
        before = self._excess
        self._excess = max(0, load.running + load.waiting - self.hold.sequences)
        self.foreign = self._excess if before is None else min(before, self._excess)

    def announced(self, sequences: int) -> None:
        """So many of the foreign sequences are known now."""
        self.foreign = max(0, self.foreign - sequences)
        if self._excess is not None:
            self._excess = max(0, self._excess - sequences)

    def has_room(self, sequences: int, tokens: int) -> bool:
        """Whether it takes so much more. What is larger than the executor itself runs alone, a part at a time."""
        hold = self.hold
        busy = hold.sequences + self.foreign
        return busy == 0 or (busy + sequences <= self.limit and hold.tokens + tokens <= self.kv_tokens)
