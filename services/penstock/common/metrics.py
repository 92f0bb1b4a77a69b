"""A Prometheus endpoint for one registry, and the buckets that services share: vLLM's, so that its dashboards fit."""

from __future__ import annotations

import asyncio
import threading
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Gauge, disable_created_metrics, start_http_server

from penstock.common.addresses import host_and_port
from penstock.common.service import StartError

__all__ = [
    "E2E_SECONDS",
    "INTER_TOKEN_SECONDS",
    "STEP_TOKENS",
    "TIME_TO_FIRST_TOKEN_SECONDS",
    "MetricsServer",
    "count_tasks",
    "serve",
]

TIME_TO_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
# For all that lasts as long as a request: the whole of it, its queue time, its prefill, its decode.
E2E_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKENS = tuple(float(n) for n in (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384))


# The time of each counter's first use, as a series of its own: half as many again, and read by nobody.
disable_created_metrics()  # type: ignore[no-untyped-call]


class MetricsServer:
    """A running endpoint. `address` is where it listens, HOST:PORT."""

    def __init__(self, address: str, server: WSGIServer, thread: threading.Thread) -> None:
        self.address = address
        self._server = server
        self._thread = thread

    def close(self) -> None:
        """Stop answering and give the port back. Idempotent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def count_tasks(registry: CollectorRegistry) -> None:
    """Tell how many tasks the running event loop has: what a service takes for each request or stream, and has to give back."""
    loop = asyncio.get_running_loop()
    tasks = Gauge("penstock_tasks", "Tasks of the process's event loop.", registry=registry)
    tasks.set_function(lambda: len(asyncio.all_tasks(loop)))


def serve(registry: CollectorRegistry, address: str) -> MetricsServer:
    """Answer ``GET /metrics`` on HOST:PORT (port 0 takes a free one), from a thread of its own.

    Raises:
        StartError: the address is no HOST:PORT or can not be bound.
    """
    try:
        host, port = host_and_port(address)
        server, thread = start_http_server(port, addr=host.strip("[]"), registry=registry)
    except ValueError as error:
        raise StartError(f"metrics: {error}") from error
    except OSError as error:
        raise StartError(f"metrics: can not listen on {address}: {error.strerror or error}") from error
    return MetricsServer(f"{host}:{server.server_port}", server, thread)
