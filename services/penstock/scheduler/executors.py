"""Executors as the scheduler keeps them, and what is leased on each."""

from __future__ import annotations

from penstock.common.handoff import RECEIVING_SHARE
from penstock.scheduler.model import Description, Load, Role
from penstock.scheduler.reach import Unreached
from penstock.scheduler.splitting import COUNTED, Pace

__all__ = ["Executor", "Hold"]

# Sequences and tokens of each. Executors are compared by one step, since what they report depends on how many run on each.
_COMMON_STEP = (8, 1024)


class Hold:
    """What is leased on one executor, leases for prefill alone included.

    Leases announced to a new scheduler stand here before the executor has registered.

    Attributes:
        prefill_leases: those of the leases that are for prefill alone.
        prefill_tokens: what these hold.
        receiving: those whose prefill runs on another executor still.
        receiving_tokens: all that these hold.
    """

    __slots__ = (
        "executor_id",
        "leases",
        "prefill_leases",
        "prefill_tokens",
        "receiving",
        "receiving_tokens",
        "sequences",
        "tokens",
    )

    def __init__(self, executor_id: str) -> None:
        self.executor_id = executor_id
        self.leases = 0
        self.prefill_leases = 0
        self.prefill_tokens = 0
        self.receiving = 0
        self.receiving_tokens = 0
        self.sequences = 0
        self.tokens = 0

    def add(self, sequences: int, tokens: int) -> None:
        """One lease more."""
        self.leases += 1
        self.sequences += sequences
        self.tokens += tokens

    def add_prefill(self, tokens: int) -> None:
        """One lease more, for the prefill of one sequence."""
        self.prefill_leases += 1
        self.prefill_tokens += tokens
        self.add(1, tokens)

    def subtract_prefill(self, tokens: int) -> None:
        """One of these less."""
        self.prefill_leases -= 1
        self.prefill_tokens -= tokens
        self.subtract(1, tokens)

    def receive(self, tokens: int) -> None:
        """A lease that is held waits for KV."""
        self.receiving += 1
        self.receiving_tokens += tokens

    def received(self, tokens: int) -> None:
        """It waits no more."""
        self.receiving -= 1
        self.receiving_tokens -= tokens

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
        prefill_slowness: how many times longer than the model's fastest executor it takes for a token of prefill.
        decode_slowness: the same for a step of decoding.
        pace: how quick it is by its own measurement; where it has made none, tokens are counted.
        role: what it is given to do now, as it has confirmed.
        spared: whether it has been given time beyond its lease since it was last heard.
        unreached: those from which it could not receive KV.
        step_seconds: of a step of decoding that is the same on all executors; 0 where it has not measured its steps.
    """

    __slots__ = (
        "_excess",
        "bit",
        "decode_slowness",
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
        "pace",
        "prefill_slowness",
        "role",
        "sequence_tokens",
        "spared",
        "step_seconds",
        "unreached",
    )

    def __init__(self, description: Description, hold: Hold, *, bit: int, look_ahead: int, expires: float) -> None:
        self.description = description
        self.hold = hold
        self.bit = bit
        self.limit = description.max_batch_size + look_ahead
        self.kv_tokens = description.kv_tokens
        self.sequence_tokens = description.sequence_tokens
        self.expires = expires
        self.spared = False
        self.draining = False
        self.role: Role = description.role
        self.load = Load()
        self.fresh_tokens = 0
        self.foreign = 0
        self._excess: int | None = None
        self.prefill_slowness = self.decode_slowness = 1.0
        times = description.times
        self.pace = COUNTED if times is None else Pace.of(times, description.prefill_chunk)
        self.step_seconds = 0.0 if times is None else times.step_seconds(*_COMMON_STEP)
        self.kv_sequence: int | None = None
        self.unreached = Unreached()

    @property
    def prefill_tokens_per_second(self) -> float:
        """What it reports, or has measured at its start until it reports; 0 where unknown."""
        times = self.description.times
        return self.load.prefill_tokens_per_second or (0.0 if times is None else times.prefill_tokens_per_second)

    @property
    def ahead(self) -> int:
        """Prompt tokens that wait for prefill there, or will: as reported, and leased since, or leased before and not come yet.

        A prefill that is leased comes once the executor that decodes has room for it. What was given back since waits no more.
        """
        load, hold = self.load, self.hold
        coming = self.fresh_tokens
        missing = hold.prefill_leases - load.running - load.waiting - load.sending
        if missing > 0:
            coming = max(coming, hold.prefill_tokens * missing // hold.prefill_leases)
        waiting = load.waiting_tokens + coming
        return waiting if self.foreign else min(waiting, hold.tokens)

    def report(self, load: Load) -> None:
        """Take over what the executor tells of itself."""
        self.load = load
        self.fresh_tokens = 0
        before = self._excess
        there = load.running + load.waiting + load.receiving + load.sending
        self._excess = max(0, there - self.hold.sequences)
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

    def has_room_to_receive(self, tokens: int) -> bool:
        """Whether one more may wait for KV here. What is larger than that part of the executor waits alone."""
        hold = self.hold
        return hold.receiving == 0 or (
            (hold.receiving + 1) * RECEIVING_SHARE <= self.limit
            and (hold.receiving_tokens + tokens) * RECEIVING_SHARE <= self.kv_tokens
        )
