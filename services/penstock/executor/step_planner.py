"""Which sequences compute how many tokens in the next step.

There is one view of a sequence: it has tokens, and so many of them are computed. Decoding is one token left, prefill is more, and
a preempted sequence is one with nothing computed. Decodes go first, so that no prompt delays them by more than its chunk; as they
take one token each and there are fewer of them than tokens in a step, prompts always get room as well.

A sequence begins with what is cached of its prompt: in blocks that it shares, or with copies where a backend can not share them.

A sequence whose KV comes from elsewhere is admitted in its turn too, and then computes nothing until the KV is there. One whose KV
goes elsewhere is never preempted: what was sent of it has to stay what it is.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter

from penstock.common.receiving import RECEIVING_SHARE
from penstock.executor.blocks import BlockManager
from penstock.executor.sequence import Sequence, Sink, Status
from penstock.executor.turns import Turns

__all__ = ["BatchLimits", "PlannerCounts", "Step", "StepPlanner"]

# Rows of logits over a whole vocabulary are large: prompts whose logits are all wanted come in such chunks.
PROMPT_LOGITS_CHUNK = 128

# Tokens of a prefix that others compute now for which a prompt waits.
WORTH_WAITING_FOR = 64

_rank = attrgetter("rank")

# Whose request, and which.
_Request = tuple[Sink, str | int]


def _request_of(sequence: Sequence) -> _Request:
    request = sequence.request
    return sequence.sink, request.request_id or request.sequence_id


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """What a step may hold.

    Attributes:
        max_batch_tokens: tokens in one step; more than `max_batch_size`.
        max_batch_size: sequences that run at a time.
        prefill_chunk: prompt tokens in a step in which others decode.
        chunked: whether a prompt may come in several steps.
        caching: whether cached prefixes are looked for.
    """

    max_batch_tokens: int
    max_batch_size: int
    prefill_chunk: int
    chunked: bool = True
    caching: bool = True


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
        self._blocks = blocks
        self._block_size = block_size
        self._copy_prefix = copy_prefix
        self.limits = limits
        self._turns = Turns()
        self._deadlines: list[tuple[float, int, Sequence]] = []

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait for its turn."""
        if self._turns.add(sequence):
            for sequences in (self.waiting, self.running):
                sequences[:] = sorted(sequences, key=_rank)
        insort(self.waiting, sequence, key=_rank)
        if sequence.request.deadline is not None:
            self._prune_deadlines()
            heapq.heappush(self._deadlines, (sequence.request.deadline, self._turns.arrivals, sequence))

    def remove(self, sequence: Sequence) -> None:
        """A sequence ends, for whatever reason: its blocks come back."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        self.receiving.pop(sequence, None)
        self.sending.pop(sequence, None)
        self._give_back(sequence)
        self._turns.remove(sequence)
        sequence.status = Status.DONE

    def go_on(self, sequence: Sequence) -> None:
        """The KV of a receiving sequence is there, of all tokens that it has: it runs, and its blocks can be shared."""
        del self.receiving[sequence]
        sequence.awaits_kv = False
        sequence.computed = len(sequence.ids)
        self._register(sequence)
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_rank)

    def set_aside(self, sequence: Sequence) -> None:
        """A running sequence has its first token and is decoded elsewhere: its blocks stay until it is removed."""
        self.running.remove(sequence)
        sequence.status = Status.SENDING
        self.sending[sequence] = None

    def expired(self, now: float) -> list[Sequence]:
        """The sequences whose deadline has passed, each told once."""
        late: list[Sequence] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = heapq.heappop(self._deadlines)[2]
            if sequence.status is not Status.DONE:
                late.append(sequence)
        return late

    @property
    def next_deadline(self) -> float:
        """When `expired` may next have something to tell; infinite where nothing has a deadline."""
        return self._deadlines[0][0] if self._deadlines else math.inf

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
        self._admit(plan)
        return Step(list(plan.counts), list(plan.counts.values()), plan.reserved)

    def advance(self, step: Step) -> None:
        """A step has been computed: blocks that it filled can be shared from now on."""
        for sequence, count in zip(step.sequences, step.counts, strict=True):
            sequence.computed += count
            self._register(sequence)

    def _register(self, sequence: Sequence) -> None:
        full = sequence.computed // self._block_size
        for i in range(sequence.registered, full):
            self._blocks.register(int(sequence.table[i]), sequence.hashes[i])
        sequence.registered = full

    def _prune_deadlines(self) -> None:
        """Let go of sequences that ended long before their deadline, once they are most of those kept."""
        if len(self._deadlines) > 64 + 2 * (len(self.waiting) + len(self.running) + len(self.receiving) + len(self.sending)):
            self._deadlines = [entry for entry in self._deadlines if entry[2].status is not Status.DONE]
            heapq.heapify(self._deadlines)

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
        coming = self._coming() if self.waiting and self.limits.caching else set()
        awaited = self._awaited_by_choices() if self.waiting and self.limits.caching else {}
        place = 0
        while place < len(self.waiting) and (taken := len(self.running) + len(self.receiving)) < self.limits.max_batch_size:
            sequence = self.waiting[place]
            needed = -(-len(sequence.ids) // self._block_size)
            found = self._find_cached(sequence, needed + taken)
            fresh = needed if self._copy_prefix else needed - len(found)
            if sequence.awaits_kv:
                waits = self._enough_receive(fresh)
            else:
                waits = self._should_wait(sequence, len(found), coming, awaited.get(_request_of(sequence), frozenset()))
            if waits:
                place += 1
                continue
            may_begin = sequence.awaits_kv or self._chunk(sequence, plan.room, len(found) * self._block_size) > 0
            # Each that runs may need a block soon; a newcomer that takes the last ones would only be preempted.
            if not may_begin or not self._blocks.can_allocate(found, fresh, spare=taken):
                return
            self._hold(sequence, found, fresh)
            del self.waiting[place]
            self._count_cached(sequence)
            self._begin(sequence, plan)
            if self.limits.caching:
                (awaited.setdefault(_request_of(sequence), set()) if sequence.awaits_kv else coming).update(sequence.fresh_hashes)
            if self._copy_prefix and sequence.computed and plan.counts:  # a copy takes as long as a step: others come with the next
                return

    def _hold(self, sequence: Sequence, found: list[int], fresh: int) -> None:
        """Give a sequence its blocks, the first of them with what was found."""
        blocks = self._blocks.allocate(found, fresh)
        if self._copy_prefix is None:
            sequence.hold(blocks)
            sequence.registered = len(found)
            sequence.computed = len(found) * self._block_size
            return
        own = blocks[len(found) :]
        sequence.hold(own)
        try:
            copied = self._copy_prefix(found, own[: len(found)]) if found else 0
            if copied < len(found):  # it would be found again, and hide what is computed in its place
                self._blocks.forget(found[copied])
        finally:
            self._blocks.release(found)
        sequence.computed = copied * self._block_size
        self._register(sequence)

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
            (held + fresh) * RECEIVING_SHARE > self._blocks.count
        )

    def _coming(self) -> set[bytes]:
        """Hashes of the blocks that running prompts, and those whose KV has begun to come, will have filled when they are through.

        One that only waits for KV may do so for long: its prompt may be the last of many where it is to be computed.
        """
        computing = (s for s in self.running if s.remaining > 1)
        arriving = (s for s in self.receiving if s.arriving)
        return {key for s in chain(computing, arriving) for key in s.fresh_hashes}

    def _awaited_by_choices(self) -> dict[_Request, set[bytes]]:
        """The same of all that receive, for the other choices of their requests: these would compute what is on its way."""
        awaited: dict[_Request, set[bytes]] = {}
        for sequence in self.receiving:
            awaited.setdefault(_request_of(sequence), set()).update(sequence.fresh_hashes)
        return awaited

    def _should_wait(self, sequence: Sequence, found: int, coming: AbstractSet[bytes], awaited: AbstractSet[bytes]) -> bool:
        """Whether so much of a prompt is being computed by others, or on its way to them, that sharing it is worth a wait."""
        least = -(-WORTH_WAITING_FOR // self._block_size)
        usable = (len(sequence.ids) - 1) // self._block_size
        if not (coming or awaited) or sequence.wants_prompt_logprobs or usable - found < least:
            return False
        return all(key in coming or key in awaited for key in sequence.hashes[found : found + least])

    def _chunk(self, sequence: Sequence, room: int, cached: int = 0) -> int:
        """How many tokens of a prompt come next; 0: none, there is no room."""
        left = sequence.remaining - cached
        if not self.limits.chunked:
            return left if left <= room else 0
        if sequence.wants_prompt_logprobs:
            room = min(room, PROMPT_LOGITS_CHUNK)
        return max(0, min(left, room))

    def _find_cached(self, sequence: Sequence, needed: int) -> list[int]:
        """Cached blocks that the sequence can begin with. Its last token is computed in any case, for its logits.

        Where it copies them, no more than there is room for beside what it `needed` without them.
        """
        if not self.limits.caching or sequence.wants_prompt_logprobs:
            return []
        found = self._blocks.find(sequence.hashes[: (len(sequence.ids) - 1) // self._block_size])
        return found[: max(0, self._blocks.available - needed)] if self._copy_prefix else found

    def _count_cached(self, sequence: Sequence) -> None:
        if sequence.preemptions or not self.limits.caching:
            return
        sequence.cached_tokens = sequence.computed
        self.counts.prefix_queries += len(sequence.ids)
        self.counts.prefix_hits += sequence.computed

    def _make_room(self, sequence: Sequence, plan: _Plan) -> bool:
        """See to it that the sequence has a block for its next token, if need be by preempting the last in rank that may be."""
        if sequence.blocks * self._block_size >= len(sequence.ids):
            return True
        while not self._blocks.can_allocate((), 1):
            victim = next(s for s in reversed(self.running) if not s.sends)
            plan.drop(victim)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.hold(self._blocks.allocate((), 1))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks; it waits, ahead of those that came later, to be computed again."""
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.status = Status.WAITING
        sequence.preemptions += 1
        self.counts.preemptions += 1
        insort(self.waiting, sequence, key=_rank)

    def _give_back(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.table[: sequence.blocks].tolist())
        sequence.blocks = sequence.computed = sequence.registered = 0
