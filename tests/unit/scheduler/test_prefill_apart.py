"""Roles, pairs, and why a request runs apart or together; what its halves hold."""

import itertools

import pytest
from scheduling import World, step_times

from penstock.common.placement import PlacementReason
from penstock.scheduler.model import Failing, Load, Role

HANDS_OVER = frozenset({"export_kv", "import_kv"})
BLOCKS = tuple(range(1, 7))


class Pools(World):
    """Executors of one version of a model that exchange KV, by role."""

    def join(self, name, role=Role.BOTH, **fields):
        return super().join(
            name, **{"role": role, "model_fingerprint": "v1", "features": HANDS_OVER, "max_batch_size": 16} | fields
        )

    def prefill(self, name="p", **fields):
        return self.join(name, Role.PREFILL, **fields)

    def decode(self, name="d", **fields):
        return self.join(name, Role.DECODE, **fields)

    def pair(self, **needs):
        """Prefill executor (None: together), decode executor and reason."""
        grant = self.outcome(**needs)
        return grant.prefill and grant.prefill.executor_id, grant.executor_id, grant.reason

    def cache(self, executor, count=6):
        self.core.executors.kv_events(executor, 1, stored=BLOCKS[:count], removed=(), cleared=False)


def apart(**config):
    return Pools(placement="apart", **config)


def test_apart_takes_one_executor_of_each_pool():
    world = apart()
    world.prefill(), world.decode()
    assert world.pair() == ("p", "d", PlacementReason.POLICY)


def test_together_leaves_prefill_to_the_executor_that_decodes():
    world = Pools(placement="together")
    world.prefill(), world.decode()
    assert world.pair() == (None, "d", PlacementReason.POLICY)
    assert world.pair(max_tokens=1) == (None, "d", PlacementReason.POLICY)


@pytest.mark.parametrize("policy", ["auto", "apart"])
def test_empty_pool_fails_no_request(policy):
    world = Pools(placement=policy)
    lonely = world.prefill()
    assert world.pair() == (None, "p", PlacementReason.NO_DECODE_EXECUTOR)
    world.core.executors.leave(lonely)
    world.decode()
    assert world.pair() == (None, "d", PlacementReason.NO_PREFILL_EXECUTOR)


def test_executors_with_both_roles_pair_only_where_all_is_to_be_split_and_nobody_else_prefills():
    auto = Pools()
    auto.join("a"), auto.join("b")
    assert auto.pair()[::2] == (None, PlacementReason.NO_PREFILL_EXECUTOR)
    world = apart()
    world.join("a")
    assert world.pair() == (None, "a", PlacementReason.NO_PREFILL_EXECUTOR)
    world.join("b")
    pairs = {world.pair()[:2] for _ in range(2)}
    assert pairs <= {("a", "b"), ("b", "a")}
    world.prefill()
    assert {world.pair()[0] for _ in range(3)} == {"p"}


def test_executor_with_both_roles_prefills_for_the_one_that_only_decodes():
    world = apart()
    world.join("a"), world.decode()
    assert world.pair() == ("a", "d", PlacementReason.POLICY)


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ({"model_fingerprint": "v2"}, {}),
        ({"model_fingerprint": ""}, {"model_fingerprint": ""}),
        ({"features": frozenset({"import_kv"})}, {}),
        ({}, {"features": frozenset({"export_kv"})}),
    ],
)
def test_pools_that_can_not_exchange_kv_are_never_paired(prefill, decode):
    world = apart()
    world.prefill(**prefill), world.decode(**decode)
    assert world.pair() == (None, "d", PlacementReason.INCOMPATIBLE)


def test_versions_of_a_model_pair_among_themselves():
    world = apart()
    world.prefill("p1", model_fingerprint="v1"), world.decode("d1", model_fingerprint="v1")
    world.prefill("p2", model_fingerprint="v2"), world.decode("d2", model_fingerprint="v2")
    assert {world.pair()[:2] for _ in range(6)} == {("p1", "d1"), ("p2", "d2")}


def test_pair_supports_the_fields_and_holds_the_sequence_on_both_sides():
    world = apart()
    world.prefill(fields=frozenset({"x"}), context_length=64)
    world.decode(fields=frozenset({"x", "y"}))
    assert world.pair(fields=("x",), prompt_tokens=10)[0] == "p"
    assert world.pair(fields=("y",), prompt_tokens=10) == (None, "d", PlacementReason.NO_PREFILL_EXECUTOR)
    assert world.pair(prompt_tokens=100) == (None, "d", PlacementReason.NO_PREFILL_EXECUTOR)


def test_executors_that_drain_or_are_avoided_are_not_paired():
    world = apart()
    world.prefill("p1"), world.prefill("p2"), world.decode()
    assert {world.pair(avoid=frozenset({"p1"}))[0] for _ in range(2)} == {"p2"}
    world.core.executors.drain(world.core.executors.get("p2"))
    assert {world.pair()[0] for _ in range(2)} == {"p1"}
    world.core.executors.drain(world.core.executors.get("p1"))
    assert world.pair() == (None, "d", PlacementReason.NO_PREFILL_EXECUTOR)


def test_answer_of_one_token_needs_nobody_to_decode():
    world = apart()
    world.prefill(), world.decode()
    busy = world.outcome(prompt_tokens=1000)
    assert busy.prefill.executor_id == "p"
    world.core.prefilled(world.gateway, busy.request_id)
    assert world.pair(max_tokens=1) == (None, "p", PlacementReason.ONE_TOKEN)


def test_prompt_that_the_decode_executor_has_cached_is_not_moved():
    world = apart()
    world.prefill()
    decode = world.decode()
    world.cache(decode, 5)
    assert world.pair(prompt_tokens=97, block_hashes=BLOCKS)[0] == "p"
    assert world.pair(prompt_tokens=96, block_hashes=BLOCKS) == (None, "d", PlacementReason.CACHED)
    world.cache(decode)
    assert world.pair(prompt_tokens=97, block_hashes=BLOCKS) == (None, "d", PlacementReason.CACHED)
    assert world.pair(prompt_tokens=10)[0] == "p", "a prompt shorter than a block is in no cache"


def test_request_that_was_lost_goes_on_where_it_can():
    world = apart()
    world.prefill(), world.decode()
    assert world.pair(replacing=True) == (None, "d", PlacementReason.REPLACED)


def test_halves_are_held_each_against_its_executor():
    world = apart(expected_output_tokens=50)
    prefill, decode = world.prefill(), world.decode()
    world.cache(prefill, 2), world.cache(decode, 1)
    grant = world.outcome(prompt_tokens=100, max_tokens=60, choices=3, block_hashes=BLOCKS)
    assert (grant.prefill.tokens, grant.prefill.cached_tokens) == (68, 32)
    assert (grant.tokens, grant.cached_tokens) == (100 + 3 * 50 - 16, 16)
    held = (prefill.hold, decode.hold)
    assert [(h.leases, h.prefill_leases, h.sequences, h.tokens) for h in held] == [(1, 1, 1, 68), (1, 0, 3, 234)]
    assert (prefill.fresh_tokens, decode.fresh_tokens) == (68, 0), "the one that decodes has nothing to prefill"


@pytest.mark.parametrize("how", ["prefilled", "release", "close", "again"])
def test_prefill_half_ends_with_prefill_or_with_the_lease(how):
    world = apart()
    prefill, decode = world.prefill(), world.decode()
    request_id = world.outcome().request_id
    if how == "prefilled":
        world.core.prefilled(world.gateway, request_id)
        world.core.prefilled(world.gateway, request_id)
        assert decode.hold.leases == 1
    elif how == "release":
        world.core.release(world.gateway, request_id)
    elif how == "close":
        world.core.close_gateway(world.gateway)
    else:
        world.core.announce(world.gateway, request_id, "d", tokens=9, choices=1)
    assert (prefill.hold.leases, prefill.hold.prefill_leases, prefill.hold.sequences, prefill.hold.tokens) == (0, 0, 0, 0)


def test_prefilled_of_what_runs_together_waits_or_is_unknown_changes_nothing():
    world = apart()
    decode = world.decode(max_batch_size=1)
    running, waiting = world.outcome().request_id, world.ask()
    for request_id in (running, waiting, 99):
        world.core.prefilled(world.gateway, request_id)
    assert (decode.hold.leases, world.core.queued) == (1, 1)


def test_full_prefill_pool_lets_wait_and_the_next_prefill_that_ends_makes_room():
    world = apart()
    world.prefill(max_batch_size=1), world.decode()
    first = world.outcome()
    waits = world.ask()
    assert world.core.step() == []
    assert world.core.pools["m"].waiting_by_role() == {Role.PREFILL: 1}
    world.core.prefilled(world.gateway, first.request_id)
    assert [(o.request_id, o.prefill.executor_id) for o in world.core.step()] == [(waits, "p")]


@pytest.mark.parametrize("role", [Role.BOTH, Role.DECODE, Role.PREFILL])
def test_queue_is_that_of_the_pool_without_room(role):
    world = apart()
    world.join("a", role, max_batch_size=1)
    world.outcome()
    world.ask(), world.ask()
    world.core.step()
    assert world.core.pools["m"].waiting_by_role() == {role: 2}


def test_half_of_an_executor_at_most_waits_for_kv():
    world = apart()
    world.prefill(max_batch_size=99), world.decode(max_batch_size=4)
    first = world.outcome()
    assert world.outcome() is not None
    waits = world.ask()
    assert world.core.step() == []
    assert world.core.pools["m"].waiting_by_role() == {Role.DECODE: 1}
    world.core.prefilled(world.gateway, first.request_id)
    assert [(o.request_id, o.prefill.executor_id) for o in world.core.step()] == [(waits, "p")]


def test_half_of_the_blocks_at_most_wait_for_kv_but_a_request_alone_may_take_more():
    world = apart(expected_output_tokens=10)
    world.prefill(), world.decode(kv_blocks=100)
    large = world.outcome(prompt_tokens=1200)
    assert world.outcome(prompt_tokens=100) is None
    world.core.prefilled(world.gateway, large.request_id)
    assert [o.prefill.executor_id for o in world.core.step()] == ["p"]


def test_auto_prefills_where_it_decodes_what_would_wait_too_long_to_hand_over():
    world = Pools()
    prefill = world.prefill(max_batch_size=99)
    world.decode(max_batch_size=8)
    ways = []
    for _ in range(6):
        ways.append(world.pair(prompt_tokens=900)[::2])
        world.core.executors.report(prefill, Load(sending=prefill.hold.prefill_leases))
    assert ways == [(None, PlacementReason.COST), *[("p", PlacementReason.COST)] * 4, (None, PlacementReason.COST)]


def calibrated(**config):
    """One pool of each, of equal speed, where three requests decode."""
    world = Pools(**config)
    for join in (world.prefill, world.decode):
        join(times=step_times(1), prefill_chunk=64, kv_bytes_per_token=100_000, kv_blocks=10_000)
    decoding(world)
    return world


def decoding(world):
    """Three requests decode."""
    world.core.announce(world.gateway, 1000, "d", tokens=300, choices=3)


def link(world, bytes_per_second):
    world.core.executors.report(world.core.executors.get("p"), Load(handoff_bytes_per_second=bytes_per_second))


LONG = {"prompt_tokens": 2000}


def test_auto_splits_long_prompts_while_others_decode():
    world = calibrated()
    assert world.pair(**LONG) == ("p", "d", PlacementReason.COST)
    assert world.pair(prompt_tokens=2) == (None, "d", PlacementReason.COST)


def test_auto_splits_nothing_where_nobody_decodes():
    world = calibrated()
    world.core.release(world.gateway, 1000)
    assert world.pair(**LONG) == (None, "d", PlacementReason.COST)


def test_auto_leaves_a_link_alone_that_is_too_slow():
    world = calibrated()
    link(world, 1e8)
    assert world.pair(**LONG)[0] is None
    link(world, 1e10)
    assert world.pair(**LONG)[0] == "p"


def test_auto_leaves_a_prefill_pool_alone_whose_queue_is_too_long():
    world = calibrated()
    prefill = world.core.executors.get("p")
    for _ in range(2):
        world.core.executors.report(prefill, Load(waiting=8, waiting_tokens=16_000))
    assert world.pair(**LONG)[0] is None
    world.core.executors.report(prefill, Load(waiting=1, waiting_tokens=2000))
    assert world.pair(**LONG)[0] == "p"


def test_auto_keeps_a_deadline_that_only_one_way_can_keep():
    world = calibrated()
    prefill = world.core.executors.get("p")
    for _ in range(2):
        world.core.executors.report(prefill, Load(waiting=1, waiting_tokens=3000))
    assert world.pair(**LONG)[0] == "p"
    assert world.pair(**LONG, deadline=3.0)[0] is None, "4 seconds there, and a half of it here"
    assert world.pair(**LONG, deadline=1.0)[0] == "p", "too late either way"


def test_auto_tells_of_a_request_that_was_lost_why_it_runs_together():
    world = calibrated()
    assert world.pair(prompt_tokens=2, replacing=True) == (None, "d", PlacementReason.REPLACED)
    assert world.pair(**LONG, replacing=True) == ("p", "d", PlacementReason.COST)


def test_auto_goes_together_where_the_prefill_pool_is_full():
    world = Pools()
    world.prefill(max_batch_size=1), world.decode()
    decoding(world)
    assert world.pair(**LONG)[0] == "p"
    assert world.pair(**LONG) == (None, "d", PlacementReason.COST)


def test_prefill_that_is_leased_and_has_not_come_is_ahead_of_the_next():
    world = apart()
    prefill, _ = world.prefill(), world.decode()
    for _ in range(2):
        world.outcome(prompt_tokens=500)
    assert prefill.ahead == 1000
    world.core.executors.report(prefill, Load())
    assert prefill.ahead == 1000, "the executor that decodes has not let them begin"
    world.core.executors.report(prefill, Load(running=1, waiting_tokens=300))
    assert prefill.ahead == 800
    world.core.executors.report(prefill, Load(sending=1, running=1, waiting_tokens=100))
    assert prefill.ahead == 100


def test_sequences_that_wait_for_kv_or_are_on_their_way_out_are_not_taken_for_others():
    world = apart()
    prefill, decode = world.prefill(), world.decode()
    for _ in range(2):
        world.outcome()
    for _ in range(2):
        world.core.executors.report(prefill, Load(running=1, sending=1))
        world.core.executors.report(decode, Load(waiting=1, receiving=1))
    assert (prefill.foreign, decode.foreign) == (0, 0)
    for _ in range(2):
        world.core.executors.report(decode, Load(receiving=5))
    assert decode.foreign == 3


def test_announced_halves_are_held_before_and_after_their_executors_register():
    world = apart(settle_seconds=3)
    world.core.announce(world.gateway, 50, "d", tokens=300, choices=2, prefill=("p", 200))
    prefill, decode = world.prefill(), world.decode()
    assert (prefill.hold.prefill_leases, prefill.hold.tokens, decode.hold.sequences, decode.hold.tokens) == (1, 200, 2, 300)
    world.core.executors.report(prefill, Load(running=1))
    world.core.executors.report(prefill, Load(running=1))
    assert prefill.foreign == 0
    world.core.prefilled(world.gateway, 50)
    assert (prefill.hold.leases, decode.hold.leases) == (0, 1)


def test_prefill_goes_where_the_prompt_is_cached_or_the_queue_is_short():
    world = apart()
    world.prefill("p1"), world.cache(world.prefill("p2")), world.decode()
    assert world.pair(prompt_tokens=100, block_hashes=BLOCKS)[0] == "p2"
    assert world.pair(prompt_tokens=1000)[0] == "p1"
    assert world.pair(prompt_tokens=1000)[0] == "p2"
    assert world.pair(prompt_tokens=100, block_hashes=BLOCKS)[0] == "p2", "a longer queue, but little to compute"


def test_flipped_role_counts_from_the_next_request_on_and_what_is_held_stays_held():
    world = apart()
    first, second = world.join("a", Role.PREFILL), world.join("b", Role.DECODE)
    before = world.outcome()
    assert (before.prefill.executor_id, before.executor_id) == ("a", "b")
    version = world.core.executors.version
    world.core.executors.take_role(first, Role.DECODE)
    assert (first.hold.prefill_leases, world.core.executors.version) == (1, version + 1)
    assert world.pair()[::2] == (None, PlacementReason.NO_PREFILL_EXECUTOR)
    world.core.executors.take_role(second, Role.PREFILL)
    assert world.pair() == ("b", "a", PlacementReason.POLICY)
    world.core.release(world.gateway, before.request_id)
    assert (first.hold.prefill_leases, second.hold.prefill_leases) == (0, 1)


def test_role_that_is_told_again_changes_nothing():
    world = apart()
    executor = world.prefill()
    version = world.core.executors.version
    world.core.executors.take_role(executor, Role.PREFILL)
    assert world.core.executors.version == version


def failed(world, executor_id, *failing):
    """An executor reports with which others its last handoffs failed, and nothing else."""
    told = tuple(Failing(*told) for told in failing)
    world.core.executors.report(world.core.executors.get(executor_id), Load(failing=told))


@pytest.mark.parametrize(("told_by", "failing"), [("p", ("d", True, 1)), ("d", ("p", False, 1))])
@pytest.mark.parametrize("policy", ["apart", "auto"])
def test_pair_that_failed_is_left_alone_and_tried_again_by_itself(policy, told_by, failing):
    world = Pools(placement=policy)
    world.prefill(), world.decode()
    world.pair(prompt_tokens=1000)  # `auto` splits what would wait for this
    assert world.pair()[0] == "p"
    failed(world, told_by, failing)
    assert world.pair() == (None, "d", PlacementReason.UNREACHABLE)
    world.at(0.6)
    assert world.pair()[0] == "p"
    assert world.pair() == (None, "d", PlacementReason.UNREACHABLE), "one request tries"
    failed(world, told_by)
    assert world.pair()[0] == "p"


def test_pair_that_fails_again_and_again_is_tried_less_and_less():
    world = apart()
    world.prefill(), world.decode()
    trials = []
    for tenth in range(3000):
        world.at(tenth / 10)
        told = len(trials)
        if told:
            failed(world, "p", ("d", True, told))
            failed(world, "d", ("p", False, told))
        grant = world.outcome()
        if grant.prefill is not None:
            trials.append(tenth / 10)
        world.core.release(world.gateway, grant.request_id)
    pauses = [round(after - before, 1) for before, after in itertools.pairwise(trials)]
    assert pauses[:4] == pytest.approx([0.5, 1, 2, 4], abs=0.11)
    assert pauses == sorted(pauses)
    assert len(trials) < 20
    assert pauses[-1] == pytest.approx(30, abs=0.5)


def test_others_are_paired_while_one_pair_is_left_alone():
    world = apart()
    world.prefill("p1"), world.prefill("p2"), world.decode("d1"), world.decode("d2")
    failed(world, "p1", ("d1", True, 1))
    assert ("p1", "d1") not in {world.pair()[:2] for _ in range(8)}
    failed(world, "d1", ("p2", False, 3))
    assert {world.pair()[1] for _ in range(3)} == {"d2"}


def test_executor_that_registers_anew_is_paired_at_once():
    world = apart()
    prefill = world.prefill()
    world.decode()
    failed(world, "p", ("d", True, 9))
    assert world.pair()[0] is None
    world.core.executors.leave(prefill)
    world.prefill()
    assert world.pair()[0] == "p"
