"""Any interleaving of gateways, executors and time: nothing leaks, nothing is lost, nothing is answered twice."""

from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from penstock.common.placement import PlacementReason
from penstock.common.step_times import Curve, StepTimes
from penstock.scheduler.config import SchedulerConfig
from penstock.scheduler.core import Scheduler
from penstock.scheduler.model import Description, Grant, Load, Lost, Needs, Reason, Role
from penstock.scheduler.timers import TICK_SECONDS

CONFIG = SchedulerConfig(
    max_queued_requests=8, settle_seconds=2.0, lease_seconds=6.0, executor_wait_seconds=4.0, model_memory_seconds=20.0, look_ahead=1
)
MODELS = ["a", "a", "a", "b"]
FIELDS = ["x", "y"]
TIMES = StepTimes(
    prefill=Curve((16, 64), (0.02, 0.05)),
    prefill_pair_seconds=1e-6,
    decode=Curve((1, 4), (0.01, 0.02)),
    decode_context=16,
    decode_token_seconds=1e-6,
)


@dataclass(eq=False)
class Side:
    """What a gateway has asked for and been told."""

    number: int
    pending: dict = field(default_factory=dict)
    leased: dict = field(default_factory=dict)
    ids: int = 0


def needs_of(**over):
    given = {
        "model": st.sampled_from([*MODELS, *MODELS, "nobody's"]),
        "tokenizer_fingerprint": st.sampled_from(["", "", "", "", "", "t"]),
        "prompt_tokens": st.integers(1, 9) | st.integers(1, 90),
        "max_tokens": st.integers(1, 9) | st.integers(1, 60),
        "choices": st.integers(1, 3),
        "block_hashes": st.lists(st.integers(0, 5), max_size=4),
        "fields": st.just(()) | st.lists(st.sampled_from(FIELDS), unique=True).map(tuple),
        "priority": st.integers(-1, 1),
        "tenant": st.sampled_from("uvw"),
        "deadline": st.none() | st.floats(-0.5, 8.0),
        "avoid": st.frozensets(st.sampled_from(["e1", "e2", "e3"]), max_size=2),
        "replacing": st.booleans(),
    }
    return st.builds(Needs, **given | over)


class SchedulerMachine(RuleBasedStateMachine):
    gateways = Bundle("gateways")

    def __init__(self):
        super().__init__()
        self.now = 100.0
        self.sides = {}
        self.executors = {}
        self.joined = 0

    @initialize(policy=st.sampled_from(["auto", "together", "apart"]))
    def begin(self, policy):
        self.policy = policy
        self.core = Scheduler(replace(CONFIG, placement=policy), lambda: self.now)

    @rule(target=gateways)
    def open_gateway(self):
        side = Side(self.core.open_gateway())
        self.sides[side.number] = side
        return side

    @rule(side=gateways)
    def close_gateway(self, side):
        if self.sides.pop(side.number, None):
            self.core.close_gateway(side.number)
            self.settle()

    @rule(
        model=st.sampled_from(MODELS),
        name=st.sampled_from(["e1", "e2", "e3"]),
        fields=st.just(frozenset(FIELDS)) | st.frozensets(st.sampled_from(FIELDS)),
        batch=st.integers(1, 3),
        blocks=st.sampled_from([4, 8]),
        fingerprint=st.sampled_from(["", "", "", "", "t"]),
        role=st.sampled_from(Role),
        version=st.sampled_from(["v1", "v1", "v1", "v2"]),
        features=st.sampled_from([frozenset({"export_kv", "import_kv"}), frozenset({"export_kv", "import_kv"}), frozenset()]),
        times=st.sampled_from([TIMES, TIMES, None]),
    )
    def join(self, model, name, fields, batch, blocks, fingerprint, role, version, features, times):
        if name in self.executors and self.executors[name].description.model != model:
            self.core.executors.leave(self.executors[name])
        description = Description(
            executor_id=name,
            address="h:1",
            model=model,
            tokenizer_fingerprint=fingerprint,
            context_length=100,
            kv_block_size=16,
            kv_blocks=blocks,
            max_batch_size=batch,
            fields=fields,
            role=role,
            model_fingerprint=version,
            features=features,
            times=times,
        )
        self.executors[name] = self.core.executors.join(description)
        self.settle()

    @rule(name=st.sampled_from(["e1", "e2", "e3"]), how=st.sampled_from(["leave", "drain", "stay"]), waiting=st.integers(0, 4))
    def hear(self, name, how, waiting):
        executor = self.executors.get(name)
        if executor is None:
            return
        if how == "leave":
            self.core.executors.leave(executor)
            del self.executors[name]
        elif how == "drain":
            self.core.executors.drain(executor)
        else:
            self.core.executors.heard(executor)
            self.core.executors.report(
                executor, Load(waiting=waiting, waiting_tokens=9 * waiting, prefill_tokens_per_second=waiting)
            )
        self.settle()

    @rule(name=st.sampled_from(["e1", "e2", "e3"]), role=st.sampled_from(Role))
    def flip(self, name, role):
        if name in self.executors:
            self.core.executors.take_role(self.executors[name], role)
            self.settle()

    @rule(
        name=st.sampled_from(["e1", "e2", "e3"]),
        sequence=st.integers(1, 3),
        hashes=st.lists(st.integers(0, 5)),
        clear=st.booleans(),
    )
    def cache(self, name, sequence, hashes, clear):
        if name in self.executors:
            self.core.executors.kv_events(self.executors[name], sequence, stored=hashes[::2], removed=hashes[1::2], cleared=clear)

    @rule(side=gateways, frame=st.lists(needs_of(), min_size=1, max_size=6))
    def place(self, side, frame):
        if side.number not in self.sides:
            return
        for needs in frame:
            side.ids += 1
            side.pending[side.ids] = (needs, self.now)
            self.core.place(side.number, side.ids, needs)
        self.settle()

    @rule(side=gateways, data=st.data(), needs=needs_of(replacing=st.just(True)))
    def place_again(self, side, data, needs):
        if side.number in self.sides and side.leased:
            request_id = data.draw(st.sampled_from(sorted(side.leased)))
            del side.leased[request_id]
            side.pending[request_id] = (needs, self.now)
            self.core.place(side.number, request_id, needs)
            self.settle()

    @rule(side=gateways, data=st.data())
    def release(self, side, data):
        if side.number in self.sides and (ids := sorted({*side.pending, *side.leased})):
            request_id = data.draw(st.sampled_from(ids))
            side.pending.pop(request_id, None)
            side.leased.pop(request_id, None)
            self.core.release(side.number, request_id)
            self.settle()

    @rule(side=gateways, data=st.data())
    def prefilled(self, side, data):
        if side.number in self.sides and (ids := sorted({*side.pending, *side.leased})):
            request_id = data.draw(st.sampled_from(ids))
            if request_id in side.leased:
                del side.leased[request_id][1:]
            self.core.prefilled(side.number, request_id)
            self.settle()

    @rule(
        side=gateways,
        name=st.sampled_from(["e1", "e2", "e3"]),
        tokens=st.integers(1, 50),
        choices=st.integers(1, 2),
        prefill=st.none() | st.tuples(st.sampled_from(["e1", "e2", "e3"]), st.integers(1, 50)),
    )
    def announce(self, side, name, tokens, choices, prefill):
        if side.number in self.sides:
            side.ids += 1
            halves = [(name, choices, tokens, 0)]
            if prefill is not None:
                halves.append((prefill[0], 1, prefill[1], 1))
            side.leased[side.ids] = halves
            self.core.announce(side.number, side.ids, name, tokens=tokens, choices=choices, prefill=prefill)
            self.settle()

    @rule(seconds=st.floats(0.01, 3.0))
    def wait(self, seconds):
        self.now += seconds
        self.settle()

    @rule()
    def wait_for_the_timer(self):
        wake = self.core.next_wake()
        if wake is not None:
            self.now = max(self.now, wake)
            self.settle()

    def settle(self):
        for outcome in self.core.step():
            if isinstance(outcome, Lost):
                assert self.executors.pop(outcome.executor_id).expires <= self.now
            elif outcome.gateway in self.sides:
                side = self.sides[outcome.gateway]
                needs, asked = side.pending.pop(outcome.request_id)
                if isinstance(outcome, Grant):
                    self.check_grant(outcome, needs, asked)
                    halves = [(outcome.executor_id, needs.choices, outcome.tokens, 0)]
                    if outcome.prefill:
                        halves.append((outcome.prefill.executor_id, 1, outcome.prefill.tokens, 1))
                    side.leased[outcome.request_id] = halves
                else:
                    self.check_refusal(outcome, needs, asked)

    def check_grant(self, grant, needs, asked):
        executor = self.executors[grant.executor_id]
        able = self.eligible(needs)
        assert executor in able
        if grant.prefill:
            self.check_pair(self.executors[grant.prefill.executor_id], executor, able)
        elif executor.role is Role.PREFILL:
            only_prefill = all(e.role is Role.PREFILL for e in able)
            assert only_prefill or grant.reason is PlacementReason.ONE_TOKEN
        assert needs.deadline is None or asked + needs.deadline > self.now
        assert 0 <= grant.cached_tokens < needs.prompt_tokens

    def check_pair(self, prefill, decode, able):
        assert self.policy != "together"
        assert prefill in able
        assert prefill is not decode
        assert decode.role is not Role.PREFILL
        assert prefill.role is Role.PREFILL or (self.policy == "apart" and prefill.role is Role.BOTH)
        assert prefill.description.model_fingerprint == decode.description.model_fingerprint
        assert "export_kv" in prefill.description.features
        assert "import_kv" in decode.description.features

    def check_refusal(self, refused, needs, asked):
        match refused.reason:
            case Reason.DEADLINE:
                assert asked + needs.deadline <= self.now
            case Reason.QUEUE_FULL:
                assert not needs.replacing
                assert refused.retry_after > 0
            case Reason.NO_EXECUTOR:
                assert self.now >= asked + CONFIG.executor_wait_seconds or self.now >= 102.0
            case Reason.UNSUPPORTED:
                assert refused.field in {"x", "y", "prompt", "stopping.max_tokens"}

    def eligible(self, needs):
        live = [e for e in self.executors.values() if e.description.model == needs.model and not e.draining]
        able = [
            e
            for e in live
            if e.description.tokenizer_fingerprint == needs.tokenizer_fingerprint
            and e.description.fields.issuperset(needs.fields)
            and needs.prompt_tokens + needs.max_tokens <= min(e.description.context_length, e.description.kv_tokens)
        ]
        return [e for e in able if e.description.executor_id not in needs.avoid] or able

    @invariant()
    def every_request_is_queued_leased_or_answered(self):
        assert self.core.queued == sum(len(side.pending) for side in self.sides.values())

    @invariant()
    def leases_are_exactly_those_told(self):
        leased = {}
        for side in self.sides.values():
            for name, choices, tokens, prefill in (half for halves in side.leased.values() for half in halves):
                counts = leased.setdefault(name, [0, 0, 0, 0, 0])
                held = (1, choices, tokens, prefill, prefill * tokens)
                leased[name] = [before + more for before, more in zip(counts, held, strict=True)]
        holds = self.core.executors.holds.values()
        found = {h.executor_id: [h.leases, h.sequences, h.tokens, h.prefill_leases, h.prefill_tokens] for h in holds}
        assert found == {name: [0, 0, 0, 0, 0] for name in self.executors} | leased

    @invariant()
    def exactly_the_leases_with_two_halves_wait_for_kv(self):
        waiting = {}
        for side in self.sides.values():
            for halves in side.leased.values():
                if len(halves) == 2:
                    name, _, tokens, _ = halves[0]
                    counts = waiting.get(name, (0, 0))
                    waiting[name] = (counts[0] + 1, counts[1] + tokens)
        for hold in self.core.executors.holds.values():
            assert (hold.receiving, hold.receiving_tokens) == waiting.get(hold.executor_id, (0, 0))

    @invariant()
    def nobody_waits_for_an_idle_executor(self):
        for side in self.sides.values():
            for needs, asked in side.pending.values():
                eligible = self.eligible(needs)
                lost_on_all = all(e.description.executor_id in needs.avoid for e in eligible)
                another_may_come = lost_on_all and self.now < max(asked + CONFIG.executor_wait_seconds, 102.0) + TICK_SECONDS
                homes = [e for e in eligible if e.role is not Role.PREFILL] or eligible
                waited_for = homes if self.policy != "apart" else eligible
                busy = [e for e in waited_for if e.hold.sequences + e.foreign]
                assert another_may_come or (len(busy) == len(homes) if self.policy != "apart" else busy or not waited_for)

    @invariant()
    def nobody_waits_beyond_the_deadline(self):
        for side in self.sides.values():
            for needs, asked in side.pending.values():
                assert needs.deadline is None or self.now < asked + needs.deadline + TICK_SECONDS

    def teardown(self):
        for number in self.sides:
            self.core.close_gateway(number)
        self.sides.clear()
        for executor in self.executors.values():
            self.core.executors.leave(executor)
        self.core.step()
        assert self.core.queued == 0
        assert not self.core.executors.holds
        assert not len(self.core._deadlines)
        assert not len(self.core._patience)
        assert not self.core.executors.prefixes._holders
        for pool in self.core.pools.values():
            assert (pool.queued, pool.queued_tokens, len(pool._tenants), len(pool._shares)) == (0, 0, 0, 0)
            assert not list(pool.waiting())


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase
