"""A process that runs one service: start, tell where it listens, drain on a signal, leave."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from penstock.common import tracing
from penstock.common.logs import logger
from penstock.common.service import Service, StartError

__all__ = ["die_with", "ending_signals", "listening_line", "parse_listening", "run"]

_LISTENING = "listening"
_CLOSE_SECONDS = 5.0
# Beyond the grace, for what a service says to those whose work has not finished in it.
_LAST_WORDS_SECONDS = 2.0

T = TypeVar("T")


def run(service: Service, grace: float = 30.0) -> int:
    """Run a service until a signal ends it, or it ends by itself.

    Writes one line to stdout, ``listening grpc=HOST:PORT …``, once it serves. `ending_signals` drain it for `grace` seconds and
    a moment more for its last words; a second one ends it at once.

    Returns:
        the process's exit status: 0 after a signal, 1 if the service could not start or failed, and 128 + the signal's number
        when a second signal cut the drain short.
    """
    process = _Run(service, grace)
    with asyncio.Runner() as runner:
        status = runner.run(process.main())
        if not process.drained:
            # A library's thread that runs on, such as the loading of a model, must not keep the process from ending.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return status


def ending_signals() -> list[signal.Signals]:
    """The signals that ask a process to leave in good order; a closed terminal's, too, unless it is to be outlived (nohup)."""
    outlives = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT] if outlives else [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def listening_line(endpoints: Mapping[str, str]) -> str:
    """The line that tells where a service listens."""
    return " ".join([_LISTENING, *(f"{protocol}={address}" for protocol, address in endpoints.items())])


def parse_listening(line: str) -> dict[str, str] | None:
    """The endpoints that `listening_line` told; None for any other line."""
    first, *rest = line.split() or [""]
    if first != _LISTENING:
        return None
    return dict(word.split("=", 1) for word in rest if "=" in word)


def die_with(fd: int) -> None:
    """End this process at once when the other end of a pipe closes, however its owner died.

    The kernel closes the owner's end even after a SIGKILL, on every POSIX system.
    """

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(fd, 1):
                pass
        os._exit(1)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()


class _Run:
    def __init__(self, service: Service, grace: float) -> None:
        self._service = service
        self._grace = grace
        self._signals: list[int] = []
        self._first = asyncio.Event()
        self._second = asyncio.Event()
        self.drained = False

    async def main(self) -> int:
        loop = asyncio.get_running_loop()
        for signum in ending_signals():
            loop.add_signal_handler(signum, self._on_signal, signum)
        try:
            status = await self._serve()
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._service.close()
            tracing.shutdown()
        return 128 + self._signals[1] if self._second.is_set() else status

    def _on_signal(self, signum: int) -> None:
        self._signals.append(signum)
        (self._second if self._first.is_set() else self._first).set()

    async def _serve(self) -> int:
        try:
            endpoints = await _until(self._service.start(), self._first)
        except StartError as error:
            return self._fail(str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, the process ends with one line that says so
            logger().exception("start failed")
            return self._fail(f"{type(error).__name__}: {error}")
        if endpoints is None:
            return 0
        _keep_for_good()
        sys.stdout.write(listening_line(endpoints) + "\n")
        sys.stdout.flush()
        try:
            await _until(self._service.wait(), self._first)
        except Exception as error:  # noqa: BLE001 - the same
            logger().exception("service failed")
            return self._fail(f"stopped: {type(error).__name__}: {error}")
        if not self._first.is_set():
            return self._fail("stopped by itself")
        await self._drain()
        return 0

    async def _drain(self) -> None:
        """Let what runs finish, unless that takes longer than the grace or a second signal comes."""
        logger().info("draining", grace_seconds=self._grace)
        try:
            async with asyncio.timeout(self._grace + _LAST_WORDS_SECONDS):
                await _until(self._service.drain(), self._second)
            self.drained = not self._second.is_set()
        except TimeoutError:
            logger().warning("drain cut short", grace_seconds=self._grace)
        except Exception:  # noqa: BLE001 - the process leaves all the same
            logger().exception("drain failed")

    def _fail(self, why: str) -> int:
        sys.stderr.write(f"penstock {self._service.name}: {' '.join(why.split())}\n")
        sys.stderr.flush()
        return 1


def _keep_for_good() -> None:
    """Take what is here now for what stays as long as the process: modules, classes, the service itself.

    A full collection looks at every object while the event loop and an engine's thread stand still: for 30 ms at these alone.
    """
    gc.collect()
    gc.freeze()


async def _until(work: Coroutine[Any, Any, T], event: asyncio.Event) -> T | None:
    """The result of `work`, or None once the event is set first; `work` is then cancelled."""
    task = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        waiting.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await asyncio.wait((task,))
