"""The executors that live: they come with their stream, stay while they report, and leave with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from penstock.scheduler.config import SchedulerConfig
from penstock.scheduler.executors import Executor, Hold
from penstock.scheduler.model import Description, Load, Lost, Role
from penstock.scheduler.prefixes import PrefixIndex
from penstock.scheduler.timers import Timers

__all__ = ["Registry"]


class Registry:
    """Executors, what is leased on each, and what each has cached.

    Args:
        config: the time after which a silent executor is lost.
        clock: tells monotonic seconds.
        changed: called with a model whose executors came, left or began to drain.
        freed: called with an executor that may have room again.

    Attributes:
        version: grows whenever the executors that take requests change.
        gaps: how often KV events of an executor were lost.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        clock: Callable[[], float],
        changed: Callable[[str], None],
        freed: Callable[[Executor], None],
    ) -> None:
        self._config = config
        self._clock = clock
        self._changed = changed
        self._on_freed = freed
        self._executors: dict[str, Executor] = {}
        self._holds: dict[str, Hold] = {}
        self._expiries: Timers[Executor] = Timers(clock())
        self._lost: list[Lost] = []
        self.prefixes = PrefixIndex()
        self.version = 0
        self.gaps = 0

    def __iter__(self) -> Iterator[Executor]:
        return iter(list(self._executors.values()))

    def peers(self, executor: Executor) -> list[Executor]:
        """Whom it may exchange KV with: the others that serve the same version of its model, those that drain too."""
        own = executor.description
        return [
            e
            for e in self._executors.values()
            if e is not executor
            and e.description.model == own.model
            and e.description.model_fingerprint == own.model_fingerprint
            and own.model_fingerprint
        ]

    @property
    def holds(self) -> Mapping[str, Hold]:
        """What is leased, by executor, registered or not."""
        return self._holds

    def get(self, executor_id: str) -> Executor | None:
        """A registered executor."""
        return self._executors.get(executor_id)

    def of_model(self, model: str) -> list[Executor]:
        """Those that serve a model."""
        return [e for e in self._executors.values() if e.description.model == model]

    def hold(self, executor_id: str) -> Hold:
        """What is leased on an executor, which may register later."""
        hold = self._holds.get(executor_id)
        if hold is None:
            hold = self._holds[executor_id] = Hold(executor_id)
        return hold

    def freed(self, hold: Hold) -> None:
        """A lease of the hold has ended."""
        executor = self._executors.get(hold.executor_id)
        if executor is not None:
            self._on_freed(executor)
        elif not hold.leases:
            self._holds.pop(hold.executor_id, None)

    def join(self, description: Description) -> Executor:
        """An executor registers. An earlier registration of the same id, whose stream is still to end, is replaced."""
        earlier = self._executors.get(description.executor_id)
        if earlier is not None:
            self.leave(earlier)
        executor = Executor(
            description,
            self.hold(description.executor_id),
            bit=self.prefixes.join(),
            look_ahead=self._config.look_ahead,
            expires=self._clock() + self._config.lease_seconds,
        )
        self._executors[description.executor_id] = executor
        self._expiries.add(executor, executor.expires)
        self._change(description.model)
        return executor

    def leave(self, executor: Executor) -> bool:
        """Its stream has ended. Whether it was registered still."""
        executor_id = executor.description.executor_id
        if self._executors.get(executor_id) is not executor:
            return False
        del self._executors[executor_id]
        self.prefixes.leave(executor.bit)
        for other in self._executors.values():
            other.unreached.forget(executor_id)
        if not executor.hold.leases:
            self._holds.pop(executor_id, None)
        self._change(executor.description.model)
        return True

    def heard(self, executor: Executor) -> None:
        """Anything came from it."""
        executor.expires = self._clock() + self._config.lease_seconds
        executor.spared = False

    def overslept(self, seconds: float) -> None:
        """What executors have said in these seconds may still be unread: none is lost before there was time to read it.

        It is as long again, at most half a lease, and each is spared once until it is heard: where every timer is late, those
        that are silent are lost all the same.
        """
        least = self._clock() + min(seconds, self._config.lease_seconds / 2)
        for executor in self._executors.values():
            if executor.expires < least and not executor.spared:
                executor.expires = least
                executor.spared = True

    def report(self, executor: Executor, load: Load) -> None:
        """It tells its load."""
        if self._executors.get(executor.description.executor_id) is not executor:
            return
        before = executor.prefill_tokens_per_second
        executor.report(load)
        self._hear_of_pairs(executor)
        if executor.prefill_tokens_per_second != before:
            self._weigh(executor.description.model)
        self._on_freed(executor)

    def drain(self, executor: Executor) -> None:
        """It takes no more requests, and finishes those that it has."""
        if not executor.draining:
            executor.draining = True
            self._change(executor.description.model)

    def take_role(self, executor: Executor, role: Role) -> None:
        """It has taken on a role. What is leased on it goes on."""
        if self._executors.get(executor.description.executor_id) is executor and executor.role is not role:
            executor.role = role
            self._change(executor.description.model)

    def kv_events(self, executor: Executor, sequence: int, *, stored: Sequence[int], removed: Sequence[int], cleared: bool) -> None:
        """Its prefix cache changed. After a gap in the sequence nothing that was known of it holds."""
        if self._executors.get(executor.description.executor_id) is not executor:
            return
        last, executor.kv_sequence = executor.kv_sequence, sequence
        gap = last is not None and sequence != last + 1
        if gap:
            self.gaps += 1
        if gap or cleared:
            self.prefixes.clear(executor.bit)
        self.prefixes.remove(executor.bit, removed)
        self.prefixes.store(executor.bit, stored)

    def stall(self, executor: Executor) -> None:
        """It tells that its engine has stopped; `expire` tells it on."""
        if self.leave(executor):
            self._lost.append(Lost(executor.description.executor_id, "its engine has stopped"))

    def expire(self, now: float) -> list[Lost]:
        """Let go of the executors from which nothing came for too long; these, and those that have stalled."""
        lost, self._lost = self._lost, []
        for executor in self._expiries.due(now):
            if self._executors.get(executor.description.executor_id) is not executor:
                continue
            if executor.expires > now:
                self._expiries.add(executor, executor.expires)
            elif self.leave(executor):
                lost.append(Lost(executor.description.executor_id, "nothing came from it within its lease"))
        return lost

    def next_expiry(self) -> float | None:
        """When `expire` may have something to do."""
        return self._expiries.next_due()

    def _hear_of_pairs(self, executor: Executor) -> None:
        """Whatever it does not tell of works, as far as it knows."""
        own, now = executor.description.executor_id, self._clock()
        sent = {f.executor_id: f.failures for f in executor.load.failing if f.sends}
        received = {f.executor_id: f.failures for f in executor.load.failing if not f.sends}
        for other in self.of_model(executor.description.model):
            executor_id = other.description.executor_id
            other.unreached.hear(own, own, sent.get(executor_id, 0), now)
            executor.unreached.hear(executor_id, own, received.get(executor_id, 0), now)

    def _weigh(self, model: str) -> None:
        peers = self.of_model(model)
        fastest = max((e.prefill_tokens_per_second for e in peers), default=0.0)
        quickest = min((e.step_seconds for e in peers if e.step_seconds > 0), default=0.0)
        for executor in peers:
            own = executor.prefill_tokens_per_second
            executor.prefill_slowness = fastest / own if own > 0 else 1.0
            step = executor.step_seconds
            executor.decode_slowness = step / quickest if step > 0 else executor.prefill_slowness

    def _change(self, model: str) -> None:
        self._weigh(model)
        self.version += 1
        self._changed(model)
