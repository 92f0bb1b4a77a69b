"""Those that do the work: runners in processes of their own, and a whole suite over gRPC."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil

from penstock.cli.bench.grpc_target import GrpcTarget
from penstock.cli.bench.scenarios import Request

__all__ = ["Contestant", "ContestantError", "Runner", "SuiteOverGrpc"]

_LOADING_SECONDS, _RUN_SECONDS = 1800, 600


class ContestantError(Exception):
    """It could not be started or failed in its work. One line that says what it said."""


class Contestant(Protocol):
    """An engine with its model loaded."""

    version: str

    def run(self, work: Sequence[Request]) -> float:
        """Seconds until the last request has ended. Raises ContestantError."""

    def processes(self) -> list[psutil.Process]:
        """All of its processes: while another one runs they should use no processor."""

    def close(self) -> None:
        """End it."""


class Runner:
    """A process of `runners`; see its protocol in `runners/serving.py`.

    Raises:
        ContestantError: it did not load.
    """

    def __init__(self, python: Path, script: Path, model: Path, precision: str, converted: Path) -> None:
        converted.mkdir(parents=True, exist_ok=True)
        self._log = (converted.parent / f"{precision.replace('/', '-')}.log").open("w")
        command = [str(python), str(script), str(model), precision, str(converted)]
        # Its own environment alone: nothing of ours is importable there.
        environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        try:
            ready = self._answer(_LOADING_SECONDS)
        except ContestantError:
            self.close()
            raise
        self.version, self.details = ready["version"], ready["details"]

    def run(self, work: Sequence[Request]) -> float:
        (new_tokens,) = {request.new_tokens for request in work}
        if self._process.stdin is None:
            raise ContestantError("no pipe to it")
        try:
            print(json.dumps({"prompts": [r.prompt for r in work], "new_tokens": new_tokens}), file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise ContestantError(f"it ended with status {self._process.wait()}; its log is {self._log.name}") from error
        seconds: float = self._answer(_RUN_SECONDS)["seconds"]
        return seconds

    def processes(self) -> list[psutil.Process]:
        return _tree(self._process.pid)

    def close(self) -> None:
        tree = _tree(self._process.pid)
        try:
            if self._process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):  # it has ended by itself
                    self._process.stdin.close()
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for process in psutil.wait_procs(tree, 10)[1]:
            process.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _answer(self, timeout: float) -> dict[str, Any]:
        """The next line. One question is open at a time, so that a line is all there is to read."""
        pipe = self._process.stdout
        if pipe is None or not select.select([pipe], [], [], timeout)[0]:
            raise ContestantError(f"it gave no answer within {timeout:g} s; its log is {self._log.name}")
        line = pipe.readline()
        if not line:
            raise ContestantError(f"it ended with status {self._process.wait()}; its log is {self._log.name}")
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise ContestantError(f"{told['error']}; its log is {self._log.name}")
        return told


class SuiteOverGrpc:
    """`penstock up` and a client in this process; `pid` is that of the former."""

    def __init__(self, address: str, pid: int) -> None:
        self._target = GrpcTarget(address, model=None, prefix_cache=False, timeout=_RUN_SECONDS)
        self._pid = pid
        self.version = self._target.description.version

    def run(self, work: Sequence[Request]) -> float:
        timelines = self._target.run(work, lambda: None)
        for error in (t.error for t in timelines if t.error is not None):
            raise ContestantError(error)
        return max(t.ended for t in timelines) - min(t.sent for t in timelines)

    def processes(self) -> list[psutil.Process]:
        return _tree(self._pid)

    def close(self) -> None:
        self._target.close()


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
