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
        foreign: sequences that it reports beyond the leases known here, such as those of gateways that have not announced yet.
        slowness: how many times longer than the model's fastest executor it takes for a token of prefill.
    """

    __slots__ = (
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
        self.slowness = 1.0
        self.kv_sequence: int | None = None

    def report(self, load: Load) -> None:
        """Take over what the executor tells of itself."""
        self.load = load
        self.fresh_tokens = 0
        self.foreign = max(0, load.running + load.waiting - self.hold.sequences)

    def has_room(self, sequences: int, tokens: int) -> bool:
        """Whether it takes so much more. What is larger than the executor itself runs alone, a part at a time."""
        hold = self.hold
        busy = hold.sequences + self.foreign
        return busy == 0 or (busy + sequences <= self.limit and hold.tokens + tokens <= self.kv_tokens)
