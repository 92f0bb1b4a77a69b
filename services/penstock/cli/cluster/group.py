"""Processes that live and end together. A member that dies is started again, one may leave, and none outlives the group."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any

from penstock.cli.cluster.child import Program
from penstock.cli.cluster.console import Console
from penstock.cli.cluster.member import GaveUp, Member
from penstock.cli.cluster.restarts import Backoff, RestartPolicy
from penstock.common.service import StartError

__all__ = ["GaveUp", "Group"]

# Beyond its own grace, what a process may take to leave.
_LEAVING_SECONDS = 10.0


class Group:
    """Supervised processes, in stages: what was started in a later stage ends before what was started in an earlier one.

    All of them hold one end of a pipe whose other end this process alone holds: they end when it does, even by SIGKILL.
    """

    def __init__(self, console: Console, policy: RestartPolicy) -> None:
        self._console = console
        self._policy = policy
        self._members: dict[str, tuple[int, Member]] = {}
        self._closing: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._read_fd, self._write_fd = os.pipe()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def members(self) -> dict[str, Member]:
        """Those that run or are on their way, by name."""
        return {name: member for name, (_, member) in self._members.items()}

    async def start(self, program: Program, stage: int) -> dict[str, str]:
        """Start a program, under a name that no other member has, and keep it running; where it listens, by protocol.

        Raises:
            StartError: it ended before it served; says which and why.
        """
        member = Member(program, self._read_fd, self._console, Backoff(self._policy))
        self._members[program.name] = (stage, member)
        try:
            endpoints = await member.start()
        except StartError:
            del self._members[program.name]
            raise
        if "metrics" in endpoints:
            url = f"http://{endpoints['metrics']}/metrics"
            self._console.line(program.name, f"metrics at {url}", event="metrics", url=url)
        member.keeping = asyncio.create_task(member.keep())
        member.keeping.add_done_callback(self._on_kept)
        return endpoints

    async def remove(self, name: str, grace: float) -> None:
        """Drain and end one member for good."""
        _, member = self._members[name]
        await member.let_go()
        await member.stop(grace + _LEAVING_SECONDS)
        del self._members[name]

    def close_first(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have this called before the group ends: it changes the group, and must not any more."""
        self._closing.append(close)

    async def stop(self, grace: float) -> None:
        """Drain and end all, the last stage first, a stage's members at once."""
        await self._let_go()
        for stage in sorted({stage for stage, _ in self._members.values()}, reverse=True):
            await asyncio.gather(*(m.stop(grace + _LEAVING_SECONDS) for s, m in self._members.values() if s == stage))
        self.close()

    async def kill(self) -> None:
        """End all at once."""
        await self._let_go()
        for member in self.members.values():
            member.kill()
        await asyncio.gather(*(member.stop(_LEAVING_SECONDS) for member in self.members.values()))
        self.close()

    def close(self) -> None:
        """Give the pipe back, which ends whatever still lives."""
        for fd in (self._read_fd, self._write_fd):
            if fd >= 0:
                os.close(fd)
        self._read_fd = self._write_fd = -1

    async def _let_go(self) -> None:
        while self._closing:
            await self._closing.pop()()
        await asyncio.gather(*(member.let_go() for member in self.members.values()))

    def _on_kept(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.failed.done():
            self.failed.set_exception(error)
