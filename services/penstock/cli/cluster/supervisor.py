"""The life of a cluster's supervisor: bring up, tell that it is ready, wait, take down."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from penstock.cli.cluster.console import Console
from penstock.cli.cluster.group import GaveUp, Group
from penstock.cli.cluster.restarts import RestartPolicy
from penstock.common.lifecycle import ending_signals
from penstock.common.service import StartError

__all__ = ["supervise"]

BringUp = Callable[[Group], Coroutine[Any, Any, str]]


async def supervise(bring_up: BringUp, console: Console, policy: RestartPolicy, grace: float) -> int:
    """Run a group of processes until a signal or a failure ends it.

    Args:
        bring_up: starts the members, and returns the line for stdout once all of them serve.
        console: where the members' lines go.
        policy: how a member that died is started again.
        grace: seconds that each stage may take to drain after SIGTERM, SIGINT or SIGHUP. A second signal ends all at once.

    Returns:
        the exit status: 0 after a signal, 1 if a member could not start or died too often, and 128 + the signal's number when
        a second signal cut the drain short.
    """
    signals = _Signals()
    group = Group(console, policy)
    status = 0
    try:
        await signals.first_of(_live(group, bring_up), signals.first)
    except (StartError, GaveUp) as error:
        console.failed(str(error))
        status = 1
    if await signals.first_of(group.stop(grace), signals.second):
        return status
    await group.kill()
    return 128 + signals.last


async def _live(group: Group, bring_up: BringUp) -> None:
    starting = asyncio.ensure_future(bring_up(group))
    try:
        await asyncio.wait((starting, group.failed), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            _print(starting.result())
        await group.failed
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)


def _print(line: str) -> None:
    try:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    except OSError as error:
        raise GaveUp(f"can not write to stdout that it is ready: {error.strerror}") from error


class _Signals:
    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.last = 0
        for signum in ending_signals():
            asyncio.get_running_loop().add_signal_handler(signum, self._on_signal, signum)

    def _on_signal(self, signum: int) -> None:
        (self.second if self.first.is_set() else self.first).set()
        self.last = signum

    async def first_of(self, work: Coroutine[Any, Any, None], event: asyncio.Event) -> bool:
        """Whether the work ended before the event, which cancels it. Raises what the work raises."""
        task, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        ended = task.done()
        waiting.cancel()
        task.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)
        if ended:
            task.result()
        return ended
