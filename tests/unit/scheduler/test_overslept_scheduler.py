"""A scheduler that was stopped itself, or got no processor, while executors lived."""

import asyncio
import time

from scheduling import World

from penstock.scheduler.driver import Driver
from penstock.scheduler.metrics import SchedulerMetrics
from penstock.scheduler.model import Lost


async def stand_still(seconds):
    """Nothing of this process runs meanwhile."""
    time.sleep(seconds)  # noqa: ASYNC251 - that is the point
    for _ in range(5):
        await asyncio.sleep(0)


async def test_it_loses_no_executor_whose_word_it_could_not_read_yet():
    world = World(asyncio.get_running_loop().time, lease_seconds=0.4)
    executor = world.join("a")
    driver = Driver(world.core, SchedulerMetrics(world.core))
    driver.kick()
    await stand_still(0)
    await stand_still(0.8)
    assert list(world.core.executors) == [executor]
    driver.stop()


def test_one_that_stays_silent_is_lost_half_a_lease_later():
    world = World(lease_seconds=2.0)
    world.join("a")
    world.now = 3.0
    world.core.executors.overslept()
    assert world.at(3.9) == []
    assert world.at(4.1) == [Lost("a", "nothing came from it within its lease")]
