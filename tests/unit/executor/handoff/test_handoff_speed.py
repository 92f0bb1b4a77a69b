import asyncio

import pytest
from handoff_net import Net, run

from penstock.executor.handoff.counts import HandoffCounts
from penstock.executor.handoff.speed import LinkSpeed

MIB = 1 << 20


def test_time_in_which_nothing_was_under_way_is_not_the_links():
    told = []
    speed = LinkSpeed(told.append)
    for second in (0, 100, 200):  # of prefill between them
        speed.pushed(4 * MIB, second)
        speed.pushed(4 * MIB, second + 1)
        speed.answered(4 * MIB, second + 2, arrived=True)
        speed.answered(4 * MIB, second + 4, arrived=True)
    assert told == [2 * MIB] * 3


def test_a_link_that_is_never_idle_is_measured_all_the_same():
    told = []
    speed = LinkSpeed(told.append)
    for second in range(100):
        speed.pushed(64 * MIB, second)
        if second:
            speed.answered(64 * MIB, second, arrived=True)
    assert told[0] == 64 * MIB
    assert len(told) == 99 // 4


def test_few_bytes_and_those_that_were_dropped_tell_no_speed():
    told = []
    speed = LinkSpeed(told.append)
    speed.pushed(MIB - 1, 0)
    speed.answered(MIB - 1, 1, arrived=True)
    speed.pushed(4 * MIB, 2)
    speed.pushed(4 * MIB, 2)
    speed.answered(4 * MIB, 3, arrived=False)
    speed.answered(4 * MIB, 4, arrived=True)
    assert not told
    speed.pushed(4 * MIB, 5)
    speed.answered(4 * MIB, 6, arrived=True)
    assert told == [4 * MIB]


def test_a_measurement_counts_for_a_minute():
    counts = HandoffCounts()
    assert counts.bytes_per_second(0.0) == 0
    counts.measured(100.0, 5.0)
    counts.measured(200.0, 6.0)
    assert 100 < counts.bytes_per_second(60.0) < 200
    assert counts.bytes_per_second(70.0) == 0
    counts.measured(50.0, 80.0)
    assert counts.bytes_per_second(80.0) == 50


async def _speed(prefill_seconds):
    net = Net()
    receiver, ticket = net.reserve(200)
    sender = net.begin(ticket)
    await net.compute(sender, 10, 7, prefill_seconds / 10)
    await net.settle(receiver, sender, until=asyncio.get_running_loop().time() + 5)
    assert net.decode.counts.bytes_per_second(asyncio.get_running_loop().time()) == 0
    return net.prefill.counts.bytes_per_second(asyncio.get_running_loop().time())


def test_a_slow_prefill_makes_no_slow_link_and_a_hidden_transfer_no_quick_one(monkeypatch):
    monkeypatch.setattr("penstock.executor.handoff.speed._LEAST_BYTES", 1)
    slow, slower = run(_speed(2.0)), run(_speed(10.0))
    assert slow == pytest.approx(slower, rel=0.01)
    # Of pushes of 64 bytes: there, three latencies long checked, and back.
    assert 64 / 0.1 < slow < 256 / 0.05
