"""One supervised process: started, started again when it dies, and in the end let go."""

from __future__ import annotations

import asyncio
import time
from enum import Enum

from penstock.cli.cluster.child import Child, Program
from penstock.cli.cluster.console import Console
from penstock.cli.cluster.restarts import Backoff
from penstock.common.service import StartError

__all__ = ["GaveUp", "Member", "State"]


class GaveUp(Exception):
    """A process died too often; the text says which and why."""


class State(Enum):
    """Where a member is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"
    LEAVING = "leaving"


class Member:
    """A member of a group. Its next start is of `program`, which may be changed meanwhile."""

    def __init__(self, program: Program, fd: int, console: Console, backoff: Backoff) -> None:
        self.program = program
        self.keeping: asyncio.Task[None] | None = None
        self.state = State.STARTING
        self.bound: dict[str, str] = {}
        self._fd = fd
        self._console = console
        self._backoff = backoff
        self._child: Child | None = None
        self._serving_since = 0.0

    @property
    def pid(self) -> int | None:
        """Of its process, while there is one."""
        return None if self._child is None else self._child.pid

    async def start(self) -> dict[str, str]:
        """Start its process; where that listens, by protocol, once it serves.

        Raises:
            StartError: it ended before that.
        """
        spawning = asyncio.ensure_future(Child.spawn(self.program, self.bound, self._fd, self._console))
        try:
            self._child = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            self._child = await spawning  # whoever ends the member has to know of it
            raise
        try:
            self.bound = await self._child.listening()
        except StartError as error:
            raise StartError(f"{self.program.name} can not start: {error}") from None
        self.state = State.RUNNING
        self._serving_since = time.monotonic()
        return self.bound

    async def keep(self) -> None:
        """Start it again whenever it dies.

        Raises:
            GaveUp: it died too often.
        """
        while self._child is not None:
            why = await self._child.exited()
            self.state = State.RESTARTING
            served = time.monotonic() - self._serving_since
            while (delay := self._backoff.after_death(served)) is not None:
                self._tell_death(why, delay)
                await asyncio.sleep(delay)
                try:
                    await self.start()
                    break
                except StartError as error:
                    why, served = str(error), 0.0
            else:
                raise GaveUp(f"{self.program.name} died {self._backoff.deaths} times in a row, last: {why}")

    def _tell_death(self, why: str, delay: float) -> None:
        text = f"died ({why}); starts again in {delay:g} s (restart {self._backoff.deaths})"
        facts = {"why": why, "starts_again_seconds": delay, "restart": self._backoff.deaths}
        self._console.line(self.program.name, text, level="warning", event="died", **facts)

    async def let_go(self) -> None:
        """Start it no more."""
        self.state = State.LEAVING
        if self.keeping is not None:
            self.keeping.cancel()
            await asyncio.gather(self.keeping, return_exceptions=True)

    async def stop(self, grace: float) -> None:
        """Ask its process to end, and end it after `grace` seconds."""
        if self._child is not None:
            await self._child.stop(grace)

    def kill(self) -> None:
        """End its process at once."""
        if self._child is not None:
            self._child.kill()
