import pytest
from scheduling import World, step_times

from penstock.common.step_times import Curve, StepTimes
from penstock.scheduler.model import Grant, Load, Lost, Needs, Reason


def cache(world, executor, *hashes, sequence=1):
    world.core.executors.kv_events(executor, sequence, stored=hashes, removed=(), cleared=False)


def test_load_is_spread_by_tokens_not_by_requests():
    world = World()
    world.join("a"), world.join("b")
    assert world.where(prompt_tokens=1000) == "a"
    assert [world.where() for _ in range(3)] == ["b", "b", "b"]


def test_cached_prefix_wins_until_the_load_outweighs_it():
    world = World()
    world.join("a", max_batch_size=99), cache(world, world.join("b", max_batch_size=99), 1, 2, 3, 4)
    placed = [world.outcome(prompt_tokens=65, max_tokens=1, block_hashes=(1, 2, 3, 4)) for _ in range(4)]
    assert placed[0].executor_id == "b"
    assert placed[0].cached_tokens == 64
    assert placed[0].tokens == 2
    world.core.executors.report(world.core.executors.get("b"), Load(waiting_tokens=500))
    assert world.where(prompt_tokens=65, block_hashes=(1, 2, 3, 4)) == "a"


def test_prefix_counts_only_up_to_the_first_block_that_is_missing_and_never_the_whole_prompt():
    world = World()
    cache(world, world.join("a"), 1, 3, 4)
    assert world.outcome(prompt_tokens=64, block_hashes=(1, 2, 3, 4)).cached_tokens == 16
    assert world.outcome(prompt_tokens=16, block_hashes=(1,)).cached_tokens == 15


def test_lost_kv_events_are_counted_and_what_was_known_is_forgotten():
    world = World()
    executor = world.join("a")
    cache(world, executor, 1, sequence=7)
    cache(world, executor, 2, sequence=9)
    assert world.core.executors.gaps == 1
    assert world.outcome(prompt_tokens=64, block_hashes=(1, 2)).cached_tokens == 0
    assert world.outcome(prompt_tokens=64, block_hashes=(2,)).cached_tokens == 16


def test_prefixes_of_an_executor_go_with_it_and_are_not_its_successors():
    world = World()
    executor = world.join("a")
    cache(world, executor, 1)
    world.core.executors.leave(executor)
    world.join("b")
    assert world.outcome(prompt_tokens=64, block_hashes=(1,)).cached_tokens == 0


def test_faster_executor_takes_more():
    world = World()
    for name, rate in (("slow", 100.0), ("fast", 300.0)):
        world.core.executors.report(world.join(name, max_batch_size=99), Load(prefill_tokens_per_second=rate))
    placed = [world.where() for _ in range(40)]
    assert placed.count("fast") == pytest.approx(30, abs=2)


def test_what_the_executor_reports_beyond_known_leases_takes_room():
    world = World()
    executor = world.join("a")
    world.core.executors.report(executor, Load(running=4))
    assert world.outcome() is None
    world.core.announce(world.gateway, 1000, "a", tokens=50, choices=3)
    assert world.core.step() == []
    world.core.release(world.gateway, 1000)
    assert [o.executor_id for o in world.core.step()] == ["a"]


def test_report_that_crossed_releases_on_its_way_takes_no_room():
    world = World()
    executor = world.join("a")
    world.core.executors.report(executor, Load())
    wave = [world.ask() for _ in range(4)]
    world.core.step()
    for request_id in wave:
        world.core.release(world.gateway, request_id)
    world.core.executors.report(executor, Load(running=4))
    assert world.outcome() is not None


def test_batch_and_look_ahead_are_given_and_the_rest_waits():
    world = World(look_ahead=2)
    world.join("a", max_batch_size=3)
    assert [world.outcome() is not None for _ in range(7)] == [True] * 5 + [False] * 2


def test_kv_cache_bounds_what_is_given_but_never_a_request_alone():
    world = World(expected_output_tokens=100)
    world.join("a", kv_blocks=20)
    assert world.outcome(prompt_tokens=300, choices=8) is not None
    assert world.outcome(prompt_tokens=1) is None


def test_large_request_is_not_overtaken_for_ever_by_small_ones():
    world = World()
    world.join("a", kv_blocks=20)
    small = world.ask(prompt_tokens=200)
    assert len(world.core.step()) == 1
    large = world.ask(prompt_tokens=300)
    assert world.outcome(prompt_tokens=2, max_tokens=1) is None
    world.core.release(world.gateway, small)
    assert world.core.step()[0].request_id == large


def test_request_for_a_full_executor_does_not_hold_up_others():
    world = World()
    world.join("a", max_batch_size=1, fields=frozenset({"x"})), world.join("b", max_batch_size=2)
    assert world.where(fields=("x",)) == "a"
    assert world.outcome(fields=("x",)) is None
    assert world.where() == "b"
    assert world.where() == "b"
    assert world.outcome() is None


def test_avoided_executor_is_used_only_where_it_is_the_only_one():
    world = World()
    world.join("a")
    world.join("b", max_batch_size=1)
    assert world.where(avoid=frozenset({"a"})) == "b"
    assert world.outcome(avoid=frozenset({"a"})) is None
    world.core.executors.leave(world.core.executors.get("b"))
    assert [o.executor_id for o in world.core.step()] == ["a"]


LOST_ON_A = {"avoid": frozenset({"a"}), "replacing": True}


def test_request_lost_on_the_only_executor_waits_a_moment_for_its_end_to_be_noticed():
    world = World(executor_wait_seconds=5.0)
    dying = world.join("a")
    waits = world.ask(**LOST_ON_A)
    assert world.at(0.3) == []
    world.core.executors.leave(dying)
    assert world.at(1.0) == []
    world.join("b")
    assert [(o.request_id, o.executor_id) for o in world.core.step()] == [(waits, "b")]


def test_request_lost_on_an_executor_that_lives_on_alone_is_given_to_it_again():
    world = World(executor_wait_seconds=5.0)
    world.join("a")
    waits = world.ask(**LOST_ON_A)
    assert world.at(0.3) == []
    assert [(o.request_id, o.executor_id) for o in world.at(0.6)] == [(waits, "a")]


def test_request_lost_on_the_last_executor_is_refused_when_none_comes():
    world = World(executor_wait_seconds=5.0)
    dying = world.join("a")
    world.ask(**LOST_ON_A)
    world.core.step()
    world.core.executors.leave(dying)
    assert world.at(4.9) == []
    assert [o.reason for o in world.at(5.1)] == [Reason.NO_EXECUTOR]


def test_other_tokenizer_is_never_chosen():
    world = World(executor_wait_seconds=5)
    world.join("a", tokenizer_fingerprint="old")
    assert world.outcome(tokenizer_fingerprint="new") is None
    (refused,) = world.at(5.1)
    assert refused.reason is Reason.NO_EXECUTOR
    assert "tokenizer" in refused.message


def test_fields_that_no_executor_supports_together_are_refused_by_name():
    world = World()
    world.join("a", fields=frozenset({"x"})), world.join("b", fields=frozenset({"y"}))
    refused = world.outcome(fields=("x", "y"))
    assert (refused.reason, refused.field) == (Reason.UNSUPPORTED, "y")
    assert "together" in refused.message


def test_queued_request_is_refused_when_the_only_executor_that_supports_it_goes():
    world = World()
    able = world.join("a", max_batch_size=1, fields=frozenset({"x"}))
    world.join("b")
    world.where(fields=("x",))
    assert world.outcome(fields=("x",)) is None
    world.core.executors.leave(able)
    assert [(o.reason, o.field) for o in world.core.step()] == [(Reason.UNSUPPORTED, "x")]


def test_draining_executor_gets_nothing_new_and_keeps_what_it_has():
    world = World(executor_wait_seconds=5)
    executor = world.join("a")
    world.where()
    world.core.executors.drain(executor)
    assert world.outcome() is None
    assert executor.hold.leases == 1
    assert [o.reason for o in world.at(5.1)] == [Reason.NO_EXECUTOR]


def test_deadline_passes_by_the_timer_alone_and_never_early():
    world = World()
    world.join("a", max_batch_size=1)
    world.where()
    waits = world.ask(deadline=2.0)
    assert world.core.step() == []
    assert world.at(1.99) == []
    assert world.core.next_wake() == pytest.approx(2.0, abs=0.011)
    (refused,) = world.at(world.core.next_wake())
    assert (refused.request_id, refused.reason) == (waits, Reason.DEADLINE)
    assert world.core.queued == 0


def test_room_that_comes_after_the_deadline_goes_to_the_next():
    world = World()
    world.join("a", max_batch_size=1)
    running = world.ask()
    late, next_one = world.ask(deadline=1.0), world.ask()
    world.core.step()
    world.now = 1.0
    world.core.release(world.gateway, running)
    assert {(o.request_id, type(o) is Grant) for o in world.core.step()} == {(late, False), (next_one, True)}


def test_model_that_nobody_serves_is_unknown_after_its_memory():
    world = World(model_memory_seconds=60, executor_wait_seconds=5)
    world.now = 61.0
    assert world.outcome().reason is Reason.UNKNOWN_MODEL
    executor = world.join("a")
    world.core.executors.leave(executor)
    world.now = 120.0
    assert world.outcome() is None
    world.now = 200.0
    world.core.step()
    assert world.outcome().reason is Reason.UNKNOWN_MODEL


def test_new_scheduler_takes_no_model_for_unknown_that_may_have_been_served_before_its_start():
    world = World(settle_seconds=3, executor_wait_seconds=30)
    first, other = world.ask(), world.ask(model="other")
    assert world.at(3.9) == []
    world.join("a")
    assert [(o.request_id, o.executor_id) for o in world.core.step()] == [(first, "a")]
    later = world.ask(model="another")
    (refused,) = world.at(30.01)
    assert (refused.request_id, refused.reason) == (other, Reason.NO_EXECUTOR)
    assert refused.retry_after > 0
    world.join("b", model="another")
    assert [(o.request_id, o.executor_id) for o in world.core.step()] == [(later, "b")]
    assert set(world.core.pools) == {"m", "another"}


def test_announced_leases_count_before_and_after_the_executor_registers():
    world = World(settle_seconds=3)
    world.core.announce(world.gateway, 50, "a", tokens=100, choices=4)
    world.join("a")
    assert world.outcome() is None
    world.core.release(world.gateway, 50)
    assert [o.executor_id for o in world.core.step()] == ["a"]


def test_silent_executor_is_lost_and_its_queue_waits_for_another():
    world = World(lease_seconds=2.0)
    world.join("a", max_batch_size=1)
    world.where()
    waits = world.ask()
    assert world.at(1.9) == []
    assert world.at(2.02) == [Lost("a", "nothing came from it within its lease")]
    world.join("b")
    assert [(o.request_id, o.executor_id) for o in world.core.step()] == [(waits, "b")]


def test_executor_that_registers_twice_counts_once_and_keeps_its_leases():
    world = World()
    earlier = world.join("a", max_batch_size=1)
    world.where()
    later = world.join("a", max_batch_size=1)
    assert later.hold.leases == 1
    assert world.outcome() is None
    assert not world.core.executors.leave(earlier)
    assert [e is later for e in world.core.executors] == [True]


def test_placing_an_id_again_gives_its_first_lease_back():
    world = World()
    executor = world.join("a", max_batch_size=1)
    request_id = world.ask()
    world.core.step()
    world.core.place(world.gateway, request_id, Needs(model="m", replacing=True))
    assert [o.request_id for o in world.core.step()] == [request_id]
    assert executor.hold.leases == 1


def test_calibrated_executor_takes_its_share_before_anything_was_measured_live():
    world = World()
    for name, scale in (("slow", 3), ("fast", 1)):
        world.join(name, max_batch_size=99, times=step_times(scale))
    placed = [world.where() for _ in range(40)]
    assert placed.count("fast") == pytest.approx(30, abs=2)


def test_live_rate_of_prefill_takes_over_from_the_calibrated_one():
    world = World()
    a, b = world.join("a", max_batch_size=99, times=step_times(1)), world.join("b", max_batch_size=99, times=step_times(1))
    calibrated = step_times(1).prefill_tokens_per_second
    world.core.executors.report(a, Load(prefill_tokens_per_second=calibrated / 4))
    assert (a.prefill_slowness, b.prefill_slowness) == (4.0, 1.0)
    assert (a.decode_slowness, b.decode_slowness) == (1.0, 1.0)
    world.core.executors.report(a, Load(prefill_tokens_per_second=calibrated))
    assert a.prefill_slowness == 1.0


def test_slow_decoding_counts_for_long_answers_even_where_prefill_is_as_fast():
    world = World()
    prefill = step_times(1).prefill
    slow = StepTimes(
        prefill=prefill, prefill_pair_seconds=0.0, decode=Curve((1,), (0.2,)), decode_context=16, decode_token_seconds=0.0
    )
    world.join("slow", max_batch_size=99, times=slow), world.join("fast", max_batch_size=99, times=step_times(1))
    placed = [world.where(prompt_tokens=1, max_tokens=2000) for _ in range(10)]
    assert placed.count("fast") > 7
