"""A scheduler that was stopped itself, or got no processor, while executors lived."""

import asyncio
import time

import pytest
from scheduling import World

from penstock.scheduler.driver import Driver
from penstock.scheduler.metrics import SchedulerMetrics
from penstock.scheduler.model import Lost

LOST = [Lost("a", "nothing came from it within its lease")]


async def stand_still(seconds):
    """Nothing of this process runs meanwhile."""
    time.sleep(seconds)  # noqa: ASYNC251 - that is the point
    for _ in range(5):
        await asyncio.sleep(0)


async def test_it_loses_no_executor_whose_word_it_could_not_read_yet():
    world = World(asyncio.get_running_loop().time, lease_seconds=1.0)
    executor = world.join("a")
    driver = Driver(world.core, SchedulerMetrics(world.core))
    driver.kick()
    await stand_still(0)
    await stand_still(1.6)
    assert list(world.core.executors) == [executor]
    driver.stop()


@pytest.mark.parametrize(("overslept", "grace"), [(0.5, 0.5), (1.0, 1.0), (30.0, 1.0)])
def test_one_that_stays_silent_is_lost_as_much_later_or_half_a_lease(overslept, grace):
    world = World(lease_seconds=2.0)
    world.join("a")
    world.now = 2.0 + overslept
    world.core.executors.overslept(overslept)
    assert world.at(2.0 + overslept + grace - 0.1) == []
    assert world.at(2.0 + overslept + grace + 0.1) == LOST


def oversleep(world, seconds):
    """Every timer is late."""
    world.now = world.core.next_wake() + seconds
    world.core.executors.overslept(seconds)
    return world.core.step()


def test_one_that_stays_silent_is_lost_where_every_timer_is_late():
    world = World(lease_seconds=2.0)
    world.join("a")
    while not (lost := oversleep(world, 0.3)):
        assert world.now < 4.0
    assert lost == LOST


def test_one_that_is_heard_between_is_spared_each_time():
    world = World(lease_seconds=2.0)
    executor = world.join("a")
    for _ in range(5):
        assert oversleep(world, 0.3) == []
        assert executor.expires == pytest.approx(world.now + 0.3)
        world.core.executors.heard(executor)
        world.at(world.now + 1.0)
