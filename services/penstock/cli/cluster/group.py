"""Processes that live and end together: each is started again when it dies, and none outlives the group."""

from __future__ import annotations

import asyncio
import os
import time

from penstock.cli.cluster.child import Child, Program
from penstock.cli.cluster.console import Console
from penstock.cli.cluster.restarts import Backoff, RestartPolicy
from penstock.common.service import StartError

__all__ = ["GaveUp", "Group"]

# Beyond its own grace, what a process may take to leave.
_LEAVING_SECONDS = 10.0


class GaveUp(Exception):
    """A process died too often; the text says which and why."""


class Group:
    """Supervised processes, in stages: what was started in a later stage ends before what was started in an earlier one.

    All of them hold one end of a pipe whose other end this process alone holds: they end when it does, even by SIGKILL.
    """

    def __init__(self, console: Console, policy: RestartPolicy) -> None:
        self._console = console
        self._policy = policy
        self._members: list[tuple[int, _Member]] = []
        self._keeping: list[asyncio.Task[None]] = []
        self._read_fd, self._write_fd = os.pipe()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self, program: Program, stage: int) -> dict[str, str]:
        """Start a program and keep it running; where it listens, by protocol.

        Raises:
            StartError: it ended before it served; says which and why.
        """
        member = _Member(program, self._read_fd, self._console, Backoff(self._policy))
        self._members.append((stage, member))
        endpoints = await member.start()
        if "metrics" in endpoints:
            self._console.line(program.name, f"metrics at http://{endpoints['metrics']}/metrics")
        keeping = asyncio.create_task(member.keep())
        keeping.add_done_callback(self._on_kept)
        self._keeping.append(keeping)
        return endpoints

    async def stop(self, grace: float) -> None:
        """Drain and end all, the last stage first, a stage's members at once."""
        await self._let_go()
        for stage in sorted({stage for stage, _ in self._members}, reverse=True):
            await asyncio.gather(*(m.stop(grace + _LEAVING_SECONDS) for s, m in self._members if s == stage))
        self.close()

    async def kill(self) -> None:
        """End all at once."""
        await self._let_go()
        for _, member in self._members:
            member.kill()
        await asyncio.gather(*(member.stop(_LEAVING_SECONDS) for _, member in self._members))
        self.close()

    def close(self) -> None:
        """Give the pipe back, which ends whatever still lives."""
        for fd in (self._read_fd, self._write_fd):
            if fd >= 0:
                os.close(fd)
        self._read_fd = self._write_fd = -1

    async def _let_go(self) -> None:
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)

    def _on_kept(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.failed.done():
            self.failed.set_exception(error)


class _Member:
    def __init__(self, program: Program, fd: int, console: Console, backoff: Backoff) -> None:
        self._program = program
        self._fd = fd
        self._console = console
        self._backoff = backoff
        self._bound: dict[str, str] = {}
        self._child: Child | None = None
        self._since = 0.0

    async def start(self) -> dict[str, str]:
        self._since = time.monotonic()
        self._child = await Child.spawn(self._program, self._bound, self._fd, self._console)
        try:
            self._bound = await self._child.listening()
        except StartError as error:
            raise StartError(f"{self._program.name} can not start: {error}") from None
        return self._bound

    async def keep(self) -> None:
        """Start it again whenever it dies.

        Raises:
            GaveUp: it died too often.
        """
        while self._child is not None:
            why = await self._child.exited()
            lived = time.monotonic() - self._since
            while (delay := self._backoff.after_death(lived)) is not None:
                self._console.line(
                    self._program.name, f"died ({why}); starts again in {delay:g} s (restart {self._backoff.deaths})"
                )
                await asyncio.sleep(delay)
                try:
                    await self.start()
                    break
                except StartError as error:
                    why, lived = str(error), 0.0
            else:
                raise GaveUp(f"{self._program.name} died {self._backoff.deaths} times in a row, last: {why}")

    async def stop(self, grace: float) -> None:
        if self._child is not None:
            await self._child.stop(grace)

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()
