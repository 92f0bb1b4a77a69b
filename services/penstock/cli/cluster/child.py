"""One process of a service: what to start, where it says that it listens, what it says about its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from penstock.cli.cluster.console import Console
from penstock.common.lifecycle import parse_listening
from penstock.common.service import StartError

__all__ = ["Child", "Program"]

_LONGEST_LINE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Program:
    """What to start.

    Attributes:
        name: how its lines are told from those of others: ``decode-1``.
        service: what it is, as its command is named: ``executor``.
        argv: the command line, without what follows.
        listen: by protocol, as the process tells it, the flag that says where to listen and the address for the first start. A
            process that is started again gets the address that the one before it bound.
    """

    name: str
    service: str
    argv: tuple[str, ...]
    listen: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def command(self, bound: Mapping[str, str], supervisor_fd: int) -> list[str]:
        """The whole command line, for a process that finds its supervisor's pipe at this descriptor."""
        listen = [word for protocol, (flag, first) in self.listen.items() for word in (flag, bound.get(protocol, first))]
        return [*self.argv, *listen, "--process", self.name, "--supervisor-fd", str(supervisor_fd)]


class Child:
    """A started process. Its lines go to the console; it leads a process group of its own, which no Ctrl-C reaches.

    It stays in the supervisor's session. Linux shares processors out between sessions first, and one that mostly sleeps, as a
    gateway does, then waits for a tenth of a second and more behind an executor that computes.
    """

    def __init__(self, program: Program, process: asyncio.subprocess.Process, console: Console) -> None:
        self._name = program.name
        self._service = program.service
        self._process = process
        self._console = console
        self._endpoints: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()
        self._complaint = ""
        self._asked_to_end = False
        self._pumps = [
            asyncio.create_task(self._pump(stream, take))
            for stream, take in ((process.stdout, self._take_stdout), (process.stderr, self._take_stderr))
            if stream is not None
        ]

    @classmethod
    async def spawn(cls, program: Program, bound: Mapping[str, str], supervisor_fd: int, console: Console) -> Child:
        """Start a program."""
        process = await asyncio.create_subprocess_exec(
            *program.command(bound, supervisor_fd),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=(supervisor_fd,),
            process_group=0,
            limit=_LONGEST_LINE,
        )
        return cls(program, process, console)

    @property
    def pid(self) -> int | None:
        """Its process's id, while it lives."""
        return self._process.pid if self._process.returncode is None else None

    async def listening(self) -> dict[str, str]:
        """Where it listens, by protocol, once it serves.

        Raises:
            StartError: it ended before that.
        """
        ended = asyncio.ensure_future(self.exited())
        try:
            await asyncio.wait((self._endpoints, ended), return_when=asyncio.FIRST_COMPLETED)
            if self._endpoints.done():
                return self._endpoints.result()
            raise StartError(ended.result())
        finally:
            ended.cancel()

    async def exited(self) -> str:
        """Why it ended, in one line, once it has."""
        status = await self._process.wait()
        await asyncio.wait(self._pumps)
        if self._complaint:
            return self._complaint
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exited with status {status}"

    async def stop(self, grace: float) -> None:
        """Ask it to end, and end it after `grace` seconds. It is asked once: a second time would cut its drain short."""
        if not self._asked_to_end:
            self._asked_to_end = True
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
        try:
            async with asyncio.timeout(grace):
                await self.exited()
        except TimeoutError:
            self._console.line(self._name, f"did not end within {grace:g} s and is killed", level="warning")
            self.kill()
            await self.exited()

    def kill(self) -> None:
        """End it and all that it started, at once."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _pump(self, stream: asyncio.StreamReader, take: Callable[[str], None]) -> None:
        while True:
            try:
                raw = await stream.readline()
            except ValueError:  # longer than any line should be; the reader has dropped what it held
                continue
            if not raw:
                return
            take(raw.decode(errors="replace").rstrip())

    def _take_stdout(self, line: str) -> None:
        endpoints = parse_listening(line)
        if endpoints is None or self._endpoints.done():
            self._console.said(self._name, self._service, line)
        else:
            self._endpoints.set_result(endpoints)

    def _take_stderr(self, line: str) -> None:
        # A service that can not start says so as itself, and what its command line refuses, the program does.
        who, colon, why = line.partition(": ")
        if colon and who in {f"penstock {self._service}", "penstock"}:
            self._complaint = why  # the supervisor says it, once
        else:
            self._console.said(self._name, self._service, line)
