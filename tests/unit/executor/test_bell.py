"""A bell, rung from another thread."""

import asyncio
import sys
import threading

import psutil
import pytest

from penstock.executor.bell import Bell

WAIT = 10.0


@pytest.fixture
async def bell():
    bell = Bell()
    yield bell
    bell.close()


async def in_a_thread(work):
    async with asyncio.timeout(WAIT):
        return await asyncio.to_thread(work)


async def test_what_any_threads_ask_for_is_called_in_the_loop_and_in_their_order(bell):
    called, done = [], asyncio.Event()
    threads, each = 4, 500

    def ask(asker):
        for i in range(each):
            bell.call(lambda i=i: called.append((asker, i, threading.get_ident())))

    async with asyncio.timeout(WAIT):
        await asyncio.gather(*(asyncio.to_thread(ask, asker) for asker in range(threads)))
        bell.call(done.set)
        await done.wait()
    assert {thread for *_, thread in called} == {threading.get_ident()}
    for asker in range(threads):
        assert [i for who, i, _ in called if who == asker] == list(range(each))


async def test_call_that_asks_for_another_is_followed_by_it(bell):
    done = asyncio.Event()
    bell.call(lambda: bell.call(done.set))
    async with asyncio.timeout(WAIT):
        await done.wait()


async def test_who_rings_keeps_the_interpreter_until_it_waits(bell):
    """Nobody takes the lock from a thread that does not give it: of many times, the loop runs at none."""
    called = threading.Event()
    given = sys.getswitchinterval()

    def ring_and_go_on():
        for _ in range(300):
            called.clear()
            bell.call(called.set)
            for _ in range(5_000):
                if called.is_set():
                    return "the loop ran meanwhile"
            called.wait(WAIT)
        return "kept"

    try:
        sys.setswitchinterval(100.0)
        assert await in_a_thread(ring_and_go_on) == "kept"
    finally:
        sys.setswitchinterval(given)
    assert called.is_set()


async def test_closed_bell_calls_nothing_and_keeps_no_descriptor():
    before, called = psutil.Process().num_fds(), []
    bell = Bell()
    bell.call(lambda: called.append("before"))
    bell.close()
    bell.close()
    bell.call(lambda: called.append("after"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not called
    assert psutil.Process().num_fds() <= before
