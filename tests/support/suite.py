"""`penstock up` as a user starts it, and what a test wants to know of it: its processes, its counts, what it wrote."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping

import grpc
import psutil

from penstock.client import Client
from penstock.internal.v1 import executor_pb2, executor_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

SERVICES = ("scheduler", "tokenizer", "executor", "gateway")


class Suite:
    """A running suite. `stop` it in the end; `with` does. `environment` is laid over this process's own."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        argv = [sys.executable, "-m", "penstock.cli", "up", *arguments, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
        self.process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
        )
        self.log: list[str] = []
        self.printed: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        line = self.process.stdout.readline()
        self.printed.append(line)
        if not line.startswith("ready "):
            self.process.kill()
            self._reader.join()
            raise AssertionError(f"no ready line but {line!r}:\n" + "\n".join(self.log))
        endpoints = dict(word.split("=") for word in line.split()[1:])
        self.http, self.grpc = endpoints["http"], endpoints["grpc"]
        self._channels: dict[str, grpc.Channel] = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def client(self) -> Client:
        return Client(self.grpc)

    def services(self, name: str) -> list[psutil.Process]:
        """The processes of a service, in the order of their start."""
        children = psutil.Process(self.process.pid).children()
        found = [
            c
            for c in children
            if c.is_running() and c.status() != psutil.STATUS_ZOMBIE and f"penstock.cli {name} " in " ".join(c.cmdline())
        ]
        return sorted(found, key=lambda c: c.create_time())

    def kill(self, name: str, which: int = 0) -> psutil.Process:
        """kill -9 a process of a service and return it once it is gone."""
        victim = self.services(name)[which]
        victim.kill()
        psutil.wait_procs([victim], timeout=30)
        return victim

    def counts(self) -> dict[str, float]:
        """What is held on behalf of requests, over all services; all zero when nothing is in work."""
        gateway = self.gauges()
        counts = {name: gateway[f"penstock_gateway_{name}"] for name in ("calls", "placings", "sequences", "decodings")}
        state = self._scheduler().ListExecutors(scheduler_pb2.ListExecutorsRequest(), timeout=10)
        counts["queued"], counts["leases"] = state.queued, sum(e.leases for e in state.executors)
        for executor in state.executors:
            told = self.executor(executor.description.address)
            counts["kv_blocks_used"] = counts.get("kv_blocks_used", 0) + told.kv_blocks_used
            counts["running"] = counts.get("running", 0) + told.load.running
            counts["waiting"] = counts.get("waiting", 0) + told.load.waiting
            whole = told.kv_blocks_used + told.kv_blocks_cached + told.kv_blocks_free
            assert whole == told.description.kv_blocks, "a KV block is in no state, or in two"
        return counts

    def executor(self, address: str) -> executor_pb2.GetExecutorResponse:
        stub = executor_pb2_grpc.ExecutorServiceStub(self._channel(address))
        return stub.GetExecutor(executor_pb2.GetExecutorRequest(), timeout=10)

    def executors(self) -> list[scheduler_pb2.ExecutorState]:
        return list(self._scheduler().ListExecutors(scheduler_pb2.ListExecutorsRequest(), timeout=10).executors)

    def gauges(self) -> Mapping[str, float]:
        """The gateway's metrics that have no labels."""
        with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, value in (line.split() for line in lines if line[0] != "#" and "{" not in line)}

    def assert_idle(self, timeout: float = 30) -> None:
        """Every count comes back to zero; waits for what is on its way."""
        assert wait_for(lambda: not any(self.counts().values()), timeout), (
            f"held: { ({k: v for k, v in self.counts().items() if v}) }"
        )

    def stop(self, by: signal.Signals = signal.SIGTERM, timeout: float = 60) -> int:
        """End the suite as its user would; its exit status."""
        if self.process.stdout.closed:
            return self.process.returncode
        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(by)
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            for channel in self._channels.values():
                channel.close()
            self._channels = {}
        left = psutil.wait_procs(children, timeout=20)[1]
        self._reader.join(timeout=10)
        self.printed += self.process.stdout.readlines()
        self.process.stdout.close()
        self.process.stderr.close()
        assert not left, f"left behind: {[p.cmdline() for p in left]}"
        return status

    def address(self, name: str) -> str:
        """Where a service's gRPC server listens."""
        if name == "gateway":
            return self.grpc
        metrics = {urllib.parse.urlsplit(url).port for url in self.metrics_urls().values()}
        listening = {c.laddr.port for c in self.services(name)[0].net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        if not listening - metrics:
            raise ConnectionError(f"the {name} does not listen")
        return f"127.0.0.1:{min(listening - metrics)}"

    def metrics_urls(self) -> dict[str, str]:
        """Each service's Prometheus endpoint, as the suite has told them."""
        events = [json.loads(line) for line in self.log]
        urls = {told["process"]: told["url"] for told in events if told["event"] == "metrics"}
        return {**urls, "gateway": f"http://{self.http}/metrics"}

    def _scheduler(self):
        return scheduler_pb2_grpc.SchedulerServiceStub(self._channel(self.address("scheduler")))

    def _channel(self, address: str) -> grpc.Channel:
        if address not in self._channels:
            self._channels[address] = grpc.insecure_channel(address, options=[("grpc.max_reconnect_backoff_ms", 500)])
        return self._channels[address]

    def _read_log(self):
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))


def wait_for(condition, timeout: float = 30):
    """The first true value of `condition`, or None after `timeout` seconds. Services that are away for now are waited for."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            if value := condition():
                return value
        except (grpc.RpcError, OSError, IndexError, psutil.NoSuchProcess):
            pass
        time.sleep(0.05)  # between two looks at another process; nothing is taken to have happened because time has passed
    return None
