"""Requests under open-loop load, in simulated time: `auto` against the policies that never and always split."""

import pytest

from penstock.scheduler.model import Role
from splitting import MACHINES, POLICIES, simulate


@pytest.mark.parametrize(
    ("machine", "decode", "rates"),
    [
        ("core", 1, (0.6, 0.04)),
        ("core", 2, (0.3, 0.02)),
        ("core", 2, (0.2, 0.15)),
        ("gpu", 1, (20.0, 1.0)),
    ],
)
def test_auto_keeps_as_many_limits_as_the_better_of_the_others(machine, decode, rates):
    runs = {policy: simulate(policy, MACHINES[machine], [Role.PREFILL, *[Role.DECODE] * decode], rates) for policy in POLICIES}
    good = {policy: run.goodput() for policy, run in runs.items()}
    assert good["auto"] >= 0.95 * max(good["together"], good["apart"]), good
    assert (runs["together"].apart, runs["apart"].apart) == (0, runs["apart"].placed)
    assert all(len(request.token_times) == request.answer for request in runs["auto"].requests)


def test_nothing_is_split_where_one_executor_has_all_the_time():
    run = simulate("auto", MACHINES["core"], [Role.PREFILL, Role.DECODE], (0.01, 0.005))
    assert run.apart < run.placed / 2
    assert run.goodput() == 1
