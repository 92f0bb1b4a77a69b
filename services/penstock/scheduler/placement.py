"""Where one request runs: on one executor, or its prefill on another. The rules of each policy, in order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from penstock.common.placement import PlacementReason
from penstock.scheduler.config import Policy
from penstock.scheduler.executors import Executor
from penstock.scheduler.model import Needs, Role
from penstock.scheduler.prefixes import PrefixIndex
from penstock.scheduler.requests import Request
from penstock.scheduler.routing import cached_tokens, choose
from penstock.scheduler.splitting import COUNTED, COUNTED_LINK, Decoding, Estimate, Pace, apart, link_seconds, splits, together
from penstock.scheduler.teams import Team

__all__ = ["Placement", "Rules", "place"]

Depths = Mapping[int, int]
# Seconds of prefill on an executor, what is ahead included; then what settles ties, and the executor.
_Timed = tuple[float, int, int, Executor]


@dataclass(frozen=True, slots=True)
class Rules:
    """What an operator has set of placement; names as in `penstock.scheduler.config`."""

    policy: Policy
    prefill_weight: float
    expected_output_tokens: int


@dataclass(slots=True)
class Placement:
    """The executor, the prompt tokens expected in its cache, why, and the same of the one that prefills, if it is another."""

    executor: Executor
    cached_tokens: int
    reason: PlacementReason
    prefill: Executor | None = None
    prefill_cached_tokens: int = 0


def place(request: Request, team: Team, index: PrefixIndex, mask: int, rules: Rules, now: float) -> Placement | Role:
    """Where a request runs now, or the pool that it has to wait for.

    Args:
        request: it fits every member of the team.
        team: who can run it.
        index: what the executors have cached.
        mask: the bits of the team.
        rules: as the operator has set them.
        now: on the clock of its deadline.
    """
    needs, reason = request.needs, team.whole
    one_token = reason is None and needs.max_tokens == 1
    sequences, tokens = needs.choices, request.tokens
    room = [e for e in (team.members if one_token else team.homes) if e.has_room(sequences, tokens)]
    if not room:
        return team.home_role
    depths = index.depths(needs.block_hashes, mask) if needs.block_hashes else {}
    if one_token:
        reason = PlacementReason.ONE_TOKEN
    elif reason is None and needs.replacing and rules.policy == "apart":
        reason = PlacementReason.REPLACED
    if reason is not None:
        return _whole(needs, room, depths, rules, reason)
    pairs = _Pairs(request, team, depths, rules, now)
    return pairs.wherever_cheaper(room) if rules.policy == "auto" else pairs.apart(room)


def _whole(needs: Needs, room: Sequence[Executor], depths: Depths, rules: Rules, reason: PlacementReason) -> Placement:
    executor, cached = choose(needs.prompt_tokens, room, depths, rules.prefill_weight)
    return Placement(executor, cached, reason)


class _Pairs:
    """One request among the executors that can exchange KV."""

    def __init__(self, request: Request, team: Team, depths: Depths, rules: Rules, now: float) -> None:
        self._request = request
        self._needs = request.needs
        self._team = team
        self._depths = depths
        self._rules = rules
        self._now = now
        self._output = min(self._needs.max_tokens, rules.expected_output_tokens)
        self._senders: dict[str, list[_Timed]] = {}
        self._decodings: dict[Executor, Decoding] = {}

    def apart(self, room: Sequence[Executor]) -> Placement | Role:
        """The best pair, whatever it costs; the pool to wait for if none has room."""
        receivers = [e for e in room if e in self._team.receivers]
        if not receivers:
            return _whole(self._needs, room, self._depths, self._rules, PlacementReason.INCOMPATIBLE)
        for executor in receivers:
            if self._all_cached(executor):
                return _whole(self._needs, [executor], self._depths, self._rules, PlacementReason.CACHED)
        found = self._best(receivers)
        if found is not None:
            return found[0]
        if not self._any_reachable(receivers):
            return _whole(self._needs, room, self._depths, self._rules, PlacementReason.UNREACHABLE)
        prefill_is_full = any(e.has_room_to_receive(self._request.tokens) for e in receivers)
        return self._team.sender_role if prefill_is_full else self._team.home_role

    def wherever_cheaper(self, room: Sequence[Executor]) -> Placement:
        """On one executor or on a pair, whichever costs less."""
        needs = self._needs
        otherwise = PlacementReason.REPLACED if needs.replacing else PlacementReason.COST
        whole = _whole(needs, room, self._depths, self._rules, otherwise)
        if self._all_cached(whole.executor):
            whole.reason = PlacementReason.CACHED
            return whole
        receivers = [e for e in room if e in self._team.receivers]
        found = self._best(receivers)
        if found is None:
            if receivers and not needs.replacing and not self._any_reachable(receivers):
                whole.reason = PlacementReason.UNREACHABLE
            return whole
        pair, split = found
        decoding = self._decoding(whole.executor)
        deadline = self._request.deadline if self._team.calibrated else None
        left = None if deadline is None else deadline - self._now
        return pair if splits(together(needs.prompt_tokens, decoding), split, left) else whole

    def _best(self, receivers: Sequence[Executor]) -> tuple[Placement, Estimate] | None:
        """The cheapest pair that has room."""
        best, found = (math.inf, 0), None
        for executor in receivers:
            sender = self._sender_for(executor) if executor.has_room_to_receive(self._request.tokens) else None
            if sender is None:
                continue
            split = apart(self._needs.prompt_tokens, sender[0], self._decoding(executor), self._link(sender[-1]))
            key = (split.cost, executor.hold.tokens)
            if found is None or key < best:
                best, found = key, (executor, sender[-1], split)
        if found is None:
            return None
        executor, prefill, split = found
        reason = PlacementReason.POLICY if self._rules.policy == "apart" else PlacementReason.COST
        return Placement(executor, self._decoding(executor).cached, reason, prefill, self._cached(prefill)), split

    def _sender_for(self, receiver: Executor) -> _Timed | None:
        """The quickest that has room."""
        version = receiver.description.model_fingerprint
        senders = self._senders.get(version)
        if senders is None:
            senders = self._senders[version] = self._timed(self._team.senders[version])
        for sender in senders:
            executor = sender[-1]
            if not self._reaches(executor, receiver):
                continue
            if executor.has_room(1, self._needs.prompt_tokens - self._cached(executor)):
                return sender
        return None

    def _any_reachable(self, receivers: Sequence[Executor]) -> bool:
        """Whether one of them can receive at all now, whoever has room."""
        senders = self._team.senders
        return any(self._reaches(s, e) for e in receivers for s in senders[e.description.model_fingerprint])

    def _reaches(self, sender: Executor, receiver: Executor) -> bool:
        return sender is not receiver and not receiver.unreached.avoids(sender.description.executor_id, self._now)

    def _timed(self, senders: Sequence[Executor]) -> list[_Timed]:
        """Prefill on each of these, the quickest first."""
        prompt, timed = self._needs.prompt_tokens, []
        for executor in senders:
            cached, pace = self._cached(executor), self._pace(executor)
            seconds = executor.ahead * pace.token_seconds + pace.prefill(prompt - cached, cached)
            timed.append((seconds, executor.hold.sequences, executor.bit, executor))
        timed.sort()
        return timed

    def _decoding(self, executor: Executor) -> Decoding:
        found = self._decodings.get(executor)
        if found is None:
            hold, sequences, pace = executor.hold, self._needs.choices, self._pace(executor)
            running = hold.sequences + executor.foreign - hold.receiving
            context = (hold.tokens + self._request.tokens) / (running + sequences)
            answer = self._output * pace.step(running + sequences, context)
            found = Decoding(pace, executor.ahead, running, pace.step(running, context), answer, self._cached(executor))
            self._decodings[executor] = found
        return found

    def _pace(self, executor: Executor) -> Pace:
        return executor.pace if self._team.calibrated else COUNTED

    def _link(self, sender: Executor) -> float:
        if not self._team.calibrated:
            return COUNTED_LINK
        return link_seconds(sender.description.kv_bytes_per_token, sender.load.handoff_bytes_per_second)

    def _cached(self, executor: Executor) -> int:
        return cached_tokens(executor, self._depths, self._needs.prompt_tokens) if self._depths else 0

    def _all_cached(self, executor: Executor) -> bool:
        """Whether it has every block of the prompt that can be taken from a cache: at least one, and not the last token's."""
        depth = self._depths.get(executor.bit, 0)
        return depth > 0 and (depth + 1) * executor.description.kv_block_size >= self._needs.prompt_tokens
