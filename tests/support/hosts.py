"""The suite over several hosts, each a network namespace with a memory file system of its own; scheduler and tokenizer share one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
from namespaces import Network
from pools import LEASE, Armed, Held, Pools, configured

from penstock.common.lifecycle import parse_listening

# Shared memory ends at a host's border.
_ALONE = ["sh", "-c", 'mount -t tmpfs penstock-tests /dev/shm && exec "$@"', "sh"]


class Hosts(Pools):
    """Services as on machines of their own, without a supervisor: a gateway, and executors whose names begin with their roles.

    Args:
        folder: for rules, the event log and the configuration.
    """

    def __init__(self, folder: Path, *executors: str, lease: float = LEASE) -> None:
        Armed.__init__(self, folder)
        self.network = Network("gateway", *executors)
        self.log: list[str] = []
        self._channels = {}
        self._processes: dict[str, subprocess.Popen] = {}
        self._addresses: dict[str, str] = {}
        self._executors = executors
        self._config = configured(folder, lease)
        try:
            self._start(executors)
        except BaseException:
            self.stop()
            raise

    def _start(self, executors: tuple[str, ...]) -> None:
        here, there = self.network.here, self.network.addresses
        scheduler = self._run("scheduler", "scheduler", "--listen", f"{here}:0")["grpc"]
        tokenizer = self._run("tokenizer", "tokenizer", "--listen", f"{here}:0", "--models", "builtin=builtin")["grpc"]
        for name in executors:
            own = ("--listen", f"{there[name]}:0", "--role", name.partition("-")[0], "--scheduler", scheduler)
            self._run(name, "executor", "--model", "builtin", "--dtype", "f32", "--threads", "1", *own)
        doors = ("--http", f"{there['gateway']}:0", "--grpc", f"{there['gateway']}:0", "--event-log", str(self.events_file))
        told = self._run("gateway", "gateway", "--scheduler", scheduler, "--tokenizer", tokenizer, *doors)
        self.http, self.grpc = told["http"], told["grpc"]

    def _run(self, name: str, service: str, *flags: str) -> dict[str, str]:
        apart = [*self.network.command(name), *_ALONE] if name in self.network.addresses else []
        process = self._processes[name] = subprocess.Popen(
            [*apart, sys.executable, "-m", "penstock.cli", service, "--config", str(self._config), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PENSTOCK_FAULTS": str(self.folder)},
        )
        threading.Thread(target=self._read, args=(name, process), daemon=True).start()
        told = parse_listening(process.stdout.readline())
        assert told, "\n".join(self.log)
        self._addresses[name] = told["grpc"]
        return told

    def _read(self, name: str, process: subprocess.Popen) -> None:
        for line in process.stderr:
            self.log.append(f"{name} | {line.rstrip()}")

    def services(self, name: str) -> list[psutil.Process]:
        """The living processes of a service."""
        own = [n for n in self._processes if n == name or (name == "executor" and n in self._executors)]
        return [psutil.Process(self._processes[n].pid) for n in own if self._processes[n].poll() is None]

    def members(self) -> list[psutil.Process]:
        return [psutil.Process(process.pid) for process in self._processes.values() if process.poll() is None]

    def held(self) -> dict[Held, int]:
        """Descriptors of every process."""
        return {Held(name, p.pid, "descriptors"): psutil.Process(p.pid).num_fds() for name, p in self._processes.items()}

    def stop(self) -> int:
        """End all of it; the worst exit status."""
        for channel in self._channels.values():
            channel.close()
        for name in self.network.addresses:
            with contextlib.suppress(OSError):
                self.network.heal(name)
        self.let_go_on()
        statuses = [self._end(process) for process in reversed(self._processes.values())]
        self.network.close()
        return max((abs(status) for status in statuses), default=0)

    def _end(self, process: subprocess.Popen) -> int:
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
