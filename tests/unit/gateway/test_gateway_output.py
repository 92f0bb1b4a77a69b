"""What a slow reader has not taken is joined: one delta a choice, bounded by the answer itself."""

import asyncio

import pytest

from penstock.common.errors import Unavailable
from penstock.gateway.answer import Finish, FinishReason
from penstock.gateway.output import OutputQueue


def queue_of(requests=1):
    return OutputQueue(requests, lambda: 7.0)


async def test_what_waits_is_joined_by_choice():
    queue = queue_of()
    output = queue.output(0, 2)
    for i in range(1000):
        output.text(0, f"{i} ", [i], ())
    output.text(1, "b", (), ())
    output.finish(1, Finish(FinishReason.STOP))
    first, second = await queue.take()
    assert first.text == "".join(f"{i} " for i in range(1000))
    assert first.token_ids == list(range(1000))
    assert (second.index, second.text, second.finish.reason) == (1, "b", FinishReason.STOP)


async def test_choices_of_later_prompts_are_counted_on():
    queue = queue_of(2)
    queue.output(1, 3).text(2, "x", (), ())
    (delta,) = await queue.take()
    assert delta.index == 5


async def test_a_failure_is_told_behind_what_was_said_before():
    queue = queue_of()
    output = queue.output(0, 1)
    output.text(0, "a", (), ())
    output.fail(Unavailable("gone"))
    assert [d.text for d in await queue.take()] == ["a"]
    with pytest.raises(Unavailable):
        await queue.take()


async def test_the_reader_is_woken_by_text_and_by_the_end():
    queue = queue_of()
    output = queue.output(0, 1)
    reader = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    output.text(0, "a", (), ())
    assert [d.text for d in await reader] == ["a"]
    reader = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    output.close(None)
    assert not await reader


async def test_waiting_is_counted_from_the_first_text_that_was_not_taken():
    queue = queue_of()
    assert queue.waiting_since is None
    queue.output(0, 1).text(0, "a", (), ())
    assert queue.waiting_since == 7.0
    await queue.take()
    assert queue.waiting_since is None
