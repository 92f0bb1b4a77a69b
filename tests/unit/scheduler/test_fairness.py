from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.scheduler.config import SchedulerConfig
from penstock.scheduler.core import Scheduler
from penstock.scheduler.model import Description, Grant, Needs, Reason


class One:
    """A scheduler with one executor that runs one sequence at a time, and a gateway."""

    def __init__(self, **config):
        self.now = 0.0
        given = {"settle_seconds": 0.0, "look_ahead": 0, "expected_output_tokens": 1000, "lease_seconds": 1e6}
        self.core = Scheduler(SchedulerConfig(**given | config), lambda: self.now)
        self.core.executors.join(
            Description(
                executor_id="e", address="h:1", model="m", context_length=5000, kv_block_size=1, kv_blocks=5000, max_batch_size=1
            )
        )
        self.gateway = self.core.open_gateway()
        self.ids = 0
        self.running = None
        self.asked = {}
        self.place("warm-up")
        self.next()

    def place(self, tenant, tokens=10, **needs):
        self.ids += 1
        given = {"model": "m", "tenant": tenant, "prompt_tokens": tokens - 1, "max_tokens": 1}
        self.asked[self.ids] = (tenant, tokens)
        self.core.place(self.gateway, self.ids, Needs(**given | needs))
        return self.ids

    def next(self):
        """End what runs; what is placed then."""
        if self.running is not None:
            self.core.release(self.gateway, self.running)
        (outcome,) = self.core.step() or (None,)
        self.running = outcome.request_id if outcome else None
        return self.running

    def refusals(self):
        return [o for o in self.core.step() if not isinstance(o, Grant)]


SIZES = st.lists(st.integers(2, 300), min_size=1, max_size=40)


@given(a=SIZES, b=SIZES)
def test_two_waiting_tenants_never_differ_by_more_than_their_largest_requests(a, b):
    one = One()
    for size in a:
        one.place("a", size)
    for size in b:
        one.place("b", size)
    left, served = Counter(a=len(a), b=len(b)), Counter()
    bound = max(a) + max(b)
    while left["a"] and left["b"]:
        tenant, tokens = one.asked[one.next()]
        left[tenant] -= 1
        served[tenant] += tokens
        assert abs(served["a"] - served["b"]) <= bound


def test_flood_of_one_tenant_delays_another_by_one_request_at_most():
    one = One()
    for _ in range(500):
        one.place("flood")
    mine = one.place("mine")
    assert mine in {one.next(), one.next()}


def test_tenant_that_was_away_has_saved_nothing_up():
    one = One()
    for _ in range(40):
        one.place("busy")
    for _ in range(20):
        one.next()
    for _ in range(10):
        one.place("back")
    order = [one.asked[one.next()][0] for _ in range(10)]
    assert Counter(order) == {"busy": 5, "back": 5}


def test_one_tenant_is_served_in_order_of_arrival():
    one = One()
    ids = [one.place("a", size) for size in (300, 2, 50, 2)]
    assert [one.next() for _ in ids] == ids


def test_higher_priority_goes_first_and_what_ran_before_goes_before_all():
    one = One()
    low, high, again = one.place("a", priority=-1), one.place("a", priority=5), one.place("a", replacing=True)
    usual = one.place("a")
    assert [one.next() for _ in range(4)] == [again, high, usual, low]


PRIORITISED = st.lists(st.tuples(st.integers(2, 300), st.integers(-100, 100)), min_size=1, max_size=40)


@given(a=PRIORITISED, b=PRIORITISED)
def test_priority_takes_no_turn_of_another_tenant_and_orders_its_own(a, b):
    one = One()
    for size, priority in a:
        one.place("a", size, priority=priority)
    for size, priority in b:
        one.place("b", size, priority=priority)
    wanted = {"a": [size for size, _ in sorted(a, key=lambda r: -r[1])], "b": [size for size, _ in sorted(b, key=lambda r: -r[1])]}
    served = {"a": [], "b": []}
    bound = max(a)[0] + max(b)[0]
    for _ in range(len(a) + len(b)):
        both_waited = all(len(served[tenant]) < len(wanted[tenant]) for tenant in "ab")
        tenant, tokens = one.asked[one.next()]
        served[tenant].append(tokens)
        assert not both_waited or abs(sum(served["a"]) - sum(served["b"])) <= bound
    assert served == wanted


def test_flood_of_highest_priority_starves_no_other_tenant():
    one = One()
    for _ in range(20):
        one.place("fair")
    order = []
    for _ in range(40):
        one.place("greedy", priority=100), one.place("greedy", priority=100)
        order.append(one.asked[one.next()][0])
    assert Counter(order) == {"fair": 20, "greedy": 20}


def test_higher_priority_goes_first_also_where_fewer_executors_can_run_it():
    one = One()
    one.core.executors.join(
        Description(
            executor_id="small", address="h:2", model="m", context_length=500, kv_block_size=1, kv_blocks=500, max_batch_size=1
        )
    )
    one.place("a"), one.core.step()  # both are full now
    one.place("a", tokens=100)
    urgent = one.place("a", tokens=2000, priority=1)
    assert one.next() == urgent


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1, 1)), min_size=1, max_size=30), st.data())
def test_released_requests_leave_the_order_of_the_others_as_it_was(asked, data):
    plain, cut = One(), One()
    ids = [(plain.place(t, priority=p), cut.place(t, priority=p)) for t, p in asked]
    gone = data.draw(st.sets(st.sampled_from([i for i, _ in ids])))
    for request_id in gone:
        cut.core.release(cut.gateway, request_id)
    order = [cut.next() for _ in range(len(ids) - len(gone))]
    assert None not in order
    assert set(order) == {i for i, _ in ids} - gone
    for tenant, priority in set(asked):
        mine = [i for (i, _), ask in zip(ids, asked, strict=True) if ask == (tenant, priority) and i not in gone]
        assert [i for i in order if i in mine] == mine


def test_flood_fills_the_queue_for_its_tenant_alone():
    one = One(max_queued_requests=100)
    for _ in range(150):
        one.place("flood")
    refused = one.refusals()
    assert {r.reason for r in refused} == {Reason.QUEUE_FULL}
    assert len(refused) == 60
    for _ in range(10):
        one.place("mine")
    assert not one.refusals()
    one.place("mine")
    assert [r.reason for r in one.refusals()] == [Reason.QUEUE_FULL]


def test_queue_is_bounded_in_tokens_too_and_what_ran_before_is_never_refused():
    one = One(max_queued_tokens=1000)
    one.place("a", 600)
    one.place("a", 600)
    assert [r.reason for r in one.refusals()] == [Reason.QUEUE_FULL]
    one.place("a", 600, replacing=True)
    assert not one.refusals()


def test_time_to_come_back_follows_the_measured_drain():
    def told(seconds_each):
        one = One(max_queued_requests=200)
        for _ in range(180):
            one.place("a")
        for _ in range(100):
            one.now += seconds_each
            one.next()
            one.place("a")
        one.place("a")
        return one.refusals()[-1].retry_after

    assert told(0.01) == pytest.approx(0.18, rel=0.2)
    assert told(0.1) == pytest.approx(1.8, rel=0.2)
