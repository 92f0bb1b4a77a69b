from penstock.cli.cluster.restarts import Backoff, RestartPolicy


def test_waits_twice_as_long_each_time_up_to_a_bound_and_then_gives_up():
    backoff = Backoff(RestartPolicy(limit=4, first_delay=1, longest_delay=3))
    assert [backoff.after_death(0) for _ in range(5)] == [1, 2, 3, 3, None]


def test_a_long_life_starts_the_count_again():
    backoff = Backoff(RestartPolicy(limit=2, first_delay=1, healthy_after=60))
    assert [backoff.after_death(0), backoff.after_death(0), backoff.after_death(60), backoff.after_death(59)] == [1, 2, 1, 2]
    assert backoff.after_death(59) is None
