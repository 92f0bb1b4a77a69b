"""Which sequences compute how many tokens in the next step.

There is one view of a sequence: it has tokens, and so many of them are computed. Decoding is one token left, prefill is more, and
a preempted sequence is one with nothing computed. Decodes go first, so that no prompt delays them by more than its chunk; as they
take one token each and there are fewer of them than tokens in a step, prompts always get room as well.

A sequence begins with what is cached of its prompt: in blocks that it shares, or with copies where a backend can not share them.

A sequence whose KV comes from elsewhere is admitted in its turn too, and then computes nothing until the KV is there. One whose KV
goes elsewhere is never preempted: what was sent of it has to stay what it is.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter

from penstock.common.handoff import RECEIVING_SHARE
from penstock.executor.awaited_prefixes import AwaitedPrefixes
from penstock.executor.block_tables import BlockTables
from penstock.executor.blocks import BlockManager
from penstock.executor.deadlines import Deadlines
from penstock.executor.sequence import Sequence, Status
from penstock.executor.turns import Turns

__all__ = ["BatchLimits", "PlannerCounts", "Step", "StepPlanner"]

# Rows of logits over a whole vocabulary are large: prompts whose logits are all wanted come in such chunks.
PROMPT_LOGITS_CHUNK = 128

_rank = attrgetter("rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """What a step may hold.

    Attributes:
        max_batch_tokens: tokens in one step; more than `max_batch_size`.
        max_batch_size: sequences that run at a time.
        prefill_chunk: prompt tokens in a step in which others decode.
        chunked: whether a prompt may come in several steps.
    """

    max_batch_tokens: int
    max_batch_size: int
    prefill_chunk: int
    chunked: bool = True


@dataclass(slots=True)
class Step:
    """The sequences of one step and how many new tokens each computes; and those whose blocks now wait for KV."""

    sequences: list[Sequence]
    counts: list[int]
    reserved: list[Sequence]


@dataclass(slots=True)
class PlannerCounts:
    """Sums since the start, in tokens but for preemptions."""

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


@dataclass(slots=True)
class _Plan:
    """A step in the making. Who is preempted after it was planned leaves it again."""

    room: int
    counts: dict[Sequence, int] = field(default_factory=dict)
    reserved: list[Sequence] = field(default_factory=list)

    def add(self, sequence: Sequence, count: int) -> None:
        self.counts[sequence] = count
        self.room -= count

    def drop(self, sequence: Sequence) -> None:
        self.room += self.counts.pop(sequence, 0)


class StepPlanner:
    """Plans the steps of one engine, whose sequences it keeps: waiting and running ones by rank, others as they came.

    Args:
        blocks: of the cache; not to be shared where prefixes are copied.
        block_size: tokens of each.
        limits: what a step may hold.
        copy_prefix: copies blocks into others, as `PrefixCopies` does; None: sequences share them.
    """

    def __init__(
        self,
        blocks: BlockManager,
        block_size: int,
        limits: BatchLimits,
        copy_prefix: Callable[[list[int], list[int]], int] | None = None,
    ) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.receiving: dict[Sequence, None] = {}
        self.sending: dict[Sequence, None] = {}
        self.counts = PlannerCounts()
        self.limits = limits
        self.deadlines = Deadlines()
        self._block_size = block_size
        self._tables = BlockTables(blocks, block_size, copy_prefix)
        self._turns = Turns()

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait for its turn."""
        self.deadlines.add(sequence, len(self.waiting) + len(self.running) + len(self.receiving) + len(self.sending))
        if self._turns.add(sequence):
            for sequences in (self.waiting, self.running):
                sequences[:] = sorted(sequences, key=_rank)
        insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """A sequence ends, for whatever reason: its blocks come back."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        self.receiving.pop(sequence, None)
        self.sending.pop(sequence, None)
        self._tables.give_back(sequence)
        self._turns.remove(sequence)
        sequence.status = Status.DONE

    def distrust(self, sequence: Sequence) -> None:
        """What was computed of a running sequence is wrong: no other begins with it."""
        self._tables.distrust(sequence)

    def go_on(self, sequence: Sequence) -> None:
        """The KV of a receiving sequence is there, of all tokens that it has: it runs, and its blocks can be shared."""
        del self.receiving[sequence]
        sequence.awaits_kv = False
        sequence.computed = len(sequence.ids)
        self._tables.register(sequence)
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_rank)

    def set_aside(self, sequence: Sequence) -> None:
        """A running sequence has its first token and is decoded elsewhere: its blocks stay until it is removed."""
        self.running.remove(sequence)
        sequence.status = Status.SENDING
        self.sending[sequence] = None

    @property
    def empty(self) -> bool:
        """Whether it has no sequence at all. May be called from other threads."""
        return not (self.waiting or self.running or self.receiving or self.sending)

    def waiting_tokens(self) -> int:
        """Tokens of prompts that are still to be computed. May be called from other threads."""
        waiting = sum(s.remaining for s in self.waiting.copy() if not s.awaits_kv)
        return waiting + sum(max(0, s.remaining - 1) for s in self.running.copy())

    def plan(self) -> Step:
        """Choose the next step; blocks for it are allocated.

        Where it is empty, it stays so until a sequence comes or ends, or KV has arrived: nothing runs, and those that wait need
        what receiving and sending ones hold.
        """
        plan = _Plan(self.limits.max_batch_tokens)
        self._plan_decodes(plan)
        if plan.counts and self.limits.chunked:
            plan.room = min(plan.room, self.limits.prefill_chunk)
        self._plan_prefills(plan)
        if self.waiting:
            self._admit(plan)
        return Step(list(plan.counts), list(plan.counts.values()), plan.reserved)

    def advance(self, step: Step) -> None:
        """A step has been computed: blocks that it filled can be shared from now on."""
        for sequence, count in zip(step.sequences, step.counts, strict=True):
            sequence.computed += count
            self._tables.register(sequence)

    def _plan_decodes(self, plan: _Plan) -> None:
        for sequence in list(self.running):
            if sequence.status is Status.RUNNING and sequence.remaining == 1 and self._make_room(sequence, plan):
                plan.add(sequence, 1)

    def _plan_prefills(self, plan: _Plan) -> None:
        """Go on with prompts that have begun. All their blocks were allocated when they were admitted."""
        for sequence in self.running:
            if sequence.remaining > 1:
                count = self._chunk(sequence, plan.room)
                if not count:
                    return
                plan.add(sequence, count)

    def _admit(self, plan: _Plan) -> None:
        """Let the first of those that wait run, as long as there are room and blocks.

        Nobody overtakes the first, unless it had better wait for a prefix that another is computing right now, the choices of one
        request arriving together, or would receive KV and enough others do.
        """
        tables = self._tables
        awaited = AwaitedPrefixes(self.running, self.receiving, self._block_size) if tables.caching else None
        place = 0
        while place < len(self.waiting) and (running := len(self.running) + len(self.receiving)) < self.limits.max_batch_size:
            sequence = self.waiting[place]
            cached, fresh = tables.find_cached(sequence, running)
            if sequence.awaits_kv:
                waits = self._enough_receive(fresh)
            else:
                waits = awaited is not None and awaited.worth_waiting_for(sequence, len(cached))
            if waits:
                place += 1
                continue
            may_begin = sequence.awaits_kv or self._chunk(sequence, plan.room, len(cached) * self._block_size) > 0
            if not may_begin or not tables.has_room(cached, fresh, running):
                return
            tables.hold(sequence, cached, fresh)
            del self.waiting[place]
            self._count_cached(sequence)
            self._begin(sequence, plan)
            if awaited is not None:
                awaited.add(sequence)
            if tables.copying and sequence.computed and plan.counts:  # a copy takes as long as a step: others come with the next
                return

    def _begin(self, sequence: Sequence, plan: _Plan) -> None:
        if sequence.awaits_kv:
            sequence.status = Status.RECEIVING
            self.receiving[sequence] = None
            plan.reserved.append(sequence)
            return
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_rank)
        if count := self._chunk(sequence, plan.room):
            plan.add(sequence, count)

    def _enough_receive(self, fresh: int) -> bool:
        """Whether those that receive have all that is meant for them. One alone may have any number of blocks."""
        if not self.receiving:
            return False
        held = sum(s.blocks for s in self.receiving)
        return (len(self.receiving) + 1) * RECEIVING_SHARE > self.limits.max_batch_size or (
            (held + fresh) * RECEIVING_SHARE > self._tables.count
        )

    def _chunk(self, sequence: Sequence, room: int, cached: int = 0) -> int:
        """How many tokens of a prompt come next; 0: none, there is no room."""
        left = sequence.remaining - cached
        if not self.limits.chunked:
            return left if left <= room else 0
        if sequence.wants_prompt_logprobs:
            room = min(room, PROMPT_LOGITS_CHUNK)
        return max(0, min(left, room))

    def _count_cached(self, sequence: Sequence) -> None:
        if sequence.preemptions or not self._tables.caching:
            return
        sequence.cached_tokens = sequence.computed
        self.counts.prefix_queries += len(sequence.ids)
        self.counts.prefix_hits += sequence.computed

    def _make_room(self, sequence: Sequence, plan: _Plan) -> bool:
        """See to it that the sequence has a block for its next token, if need be by preempting the last in rank that may be."""
        while not self._tables.grow(sequence):
            victim = next(s for s in reversed(self.running) if not s.sends)
            plan.drop(victim)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks; it waits, ahead of those that came later, to be computed again."""
        self.running.remove(sequence)
        self._tables.give_back(sequence)
        sequence.status = Status.WAITING
        sequence.preemptions += 1
        self.counts.preemptions += 1
        insort(self.waiting, sequence, key=_rank)
