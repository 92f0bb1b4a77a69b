"""An absence of another service is told once, and so is its end."""

import itertools

from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from penstock.common.waiting import Waiting

PATIENCE, QUIET = 1.5, 30


def logs(looks):
    """What is told of looks (seconds since the last, reached): (time, level, event)."""
    now = 0.0
    told = []
    waiting = Waiting("scheduler", "10.0.0.1:8012", lambda: now, PATIENCE, QUIET)
    for seconds, reached in looks:
        now += seconds
        with capture_logs() as lines:
            waiting.look(reached=reached)
        told += [(now, line) for line in lines]
    return told


def test_an_absence_names_who_is_waited_for_and_where_and_then_that_it_is_over():
    told = logs([(0.0, False), (1.0, False), (1.0, False), (50.0, False), (1.0, True), (1.0, True)])
    peer = {"waits_for": "scheduler", "address": "10.0.0.1:8012"}
    assert told == [
        (2.0, {"event": "waits: not reachable, or not serving yet", "log_level": "warning", **peer}),
        (53.0, {"event": "reached", "log_level": "info", "after_seconds": 53.0, **peer}),
    ]


def test_a_restart_is_no_absence():
    assert logs([(0.0, True), (1.0, False), (1.0, False), (0.4, True)]) == []


@given(st.lists(st.tuples(st.sampled_from([0.25, 1.0, 2.0, 20.0]), st.booleans()), max_size=60))
def test_warnings_are_apart_and_each_is_closed_at_most_once(looks):
    told = logs(looks)
    warned = [at for at, line in told if line["log_level"] == "warning"]
    assert all(later - earlier >= QUIET for earlier, later in itertools.pairwise(warned))
    assert [line["log_level"] for _, line in told] == (["warning", "info"] * len(told))[: len(told)]
