"""Asks backends what they are, so that one which raises, hangs or dies costs nobody else anything.

A built-in one is asked in a thread; one from another package, whose code nobody here has read, in a process of its own, which never
answers to more than the question. All are asked at the same time, with one deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from penstock.backends.contract import Availability, Available, Broken, Capabilities, ModelSpec, Unsupported
from penstock.backends.discovery import Source
from penstock.backends.reports import read_answer, what_was_raised, write_answer
from penstock.backends.validation import fault_of_availability, fault_of_capabilities

__all__ = ["PROBE_SECONDS", "BackendReport", "answer_of", "inspect", "manner_of_death"]

PROBE_SECONDS = 20.0

Answer = tuple[Availability, Capabilities | Unsupported | None]


@dataclass(frozen=True, slots=True)
class BackendReport:
    """What a backend says of itself.

    Attributes:
        package: the distribution that brings it and its version; empty for a built-in one.
        capabilities: for the model that was named; None where none was or the backend is not available.
    """

    name: str
    package: str
    availability: Availability
    capabilities: Capabilities | Unsupported | None


def inspect(sources: Iterable[Source], spec: ModelSpec | None, seconds: float = PROBE_SECONDS) -> list[BackendReport]:
    """Ask each backend whether it runs here and, where a model is named, what it can do with it.

    One that raises, tells nonsense, dies or has not answered after `seconds` is reported as broken, with what it did.
    """
    deadline = time.monotonic() + seconds
    asked = [_Here(source, spec) if source.built_in else _Apart(source, spec) for source in sources]
    return [BackendReport(one.source.name, one.source.package, *one.answer(deadline, seconds)) for one in asked]


def answer_of(source: Source, spec: ModelSpec | None, at: Callable[[str], object]) -> Answer:
    """Ask a backend in this thread; `at` is told each stage before it begins."""
    at("import")
    registration = source.registration()
    try:
        at("probe")
        availability = registration.probe()
        if fault := fault_of_availability(availability):
            return Broken(f"its probe tells nonsense: {fault}"), None
        if spec is None or not isinstance(availability, Available):
            return availability, None
        at("capabilities")
        capabilities = registration.capabilities(spec)
        if fault := fault_of_capabilities(capabilities):
            return Broken(f"its capabilities are nonsense: {fault}"), None
    except Exception as error:  # noqa: BLE001  a backend may raise anything; it is told, not hidden
        return Broken(f"raised {what_was_raised(error)}"), None
    return availability, capabilities


def manner_of_death(status: int) -> str:
    """How a process ended, from what `subprocess` tells."""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


class _Here:
    """A question to a built-in backend, in a thread that is left alone if it hangs."""

    def __init__(self, source: Source, spec: ModelSpec | None) -> None:
        self.source = source
        self._spec = spec
        self._stage = ""
        self._answer: Answer | None = None
        self._thread = threading.Thread(target=self._ask, name=f"probe-{source.name}", daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        self._answer = answer_of(self.source, self._spec, self._at)

    def _at(self, stage: str) -> None:
        self._stage = stage

    def answer(self, deadline: float, seconds: float) -> Answer:
        """Wait for it."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return self._answer or (Broken(f"hangs in {self._stage}: no answer within {seconds:g} s"), None)


class _Apart:
    """A question to a backend of another package, in a process that is killed if it hangs."""

    def __init__(self, source: Source, spec: ModelSpec | None) -> None:
        self.source = source
        # A file and not a pipe: what the backend prints or leaves running can neither spoil the answer nor hold it up.
        self._answers = tempfile.TemporaryFile()  # noqa: SIM115  closed when it has been read
        model = [] if spec is None else [str(spec.folder), spec.name, spec.fingerprint]
        argv = [sys.executable, "-P", "-m", "penstock.backends.apart", "inspect", source.name, str(self._answers.fileno()), *model]
        self._process = subprocess.Popen(  # noqa: S603  this interpreter and a module of this package
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(self._answers.fileno(),),
            start_new_session=True,
        )

    def answer(self, deadline: float, seconds: float) -> Answer:
        """Wait for it, and leave nothing running."""
        try:
            status = self._process.wait(max(0.0, deadline - time.monotonic()))
            end = f"died in {{}}: {manner_of_death(status)}"
        except subprocess.TimeoutExpired:
            end = f"hangs in {{}}: no answer within {seconds:g} s"
        finally:
            # Whatever it has started is of its session.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        with self._answers as file:
            file.seek(0)
            lines = file.read().splitlines()
        return _read(lines, end)


def _read(lines: list[bytes], end: str) -> Answer:
    """The answer in the last line, or the stage that was reached and how it ended there."""
    try:
        last: dict[str, Any] = json.loads(lines[-1]) if lines else {"stage": "its process"}
        return (Broken(end.format(last["stage"])), None) if "stage" in last else read_answer(last)
    except (ValueError, TypeError, KeyError) as error:
        return Broken(f"its answer can not be read: {error}"), None


def tell(fd: int, source: Source, spec: ModelSpec | None) -> None:
    """The other side of the question: write each stage and then the answer, a line each, to a file."""

    def write(line: dict[str, Any]) -> None:
        os.write(fd, json.dumps(line).encode() + b"\n")

    write(write_answer(*answer_of(source, spec, lambda stage: write({"stage": stage}))))
