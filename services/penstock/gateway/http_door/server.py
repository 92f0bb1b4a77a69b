"""uvicorn beside gRPC on one event loop; signals belong to whoever started the process."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Iterator
from dataclasses import replace

import uvicorn
from starlette.types import ASGIApp

from penstock.common.service import StartError
from penstock.gateway.http_door.connection import ConnectionBounds, bounded

__all__ = ["HttpServer"]

# A client that reads nothing is held up once so much waits for it, and its output is joined meanwhile.
_KEEP_ALIVE_SECONDS = 75


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _affordable(connections: int) -> int:
    """At most so many connections that a quarter of the files that this process may open is left for everything else."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return connections if soft == resource.RLIM_INFINITY else min(connections, soft * 3 // 4)


class HttpServer:
    """An ASGI application, served until `close`."""

    def __init__(self, app: ASGIApp, bounds: ConnectionBounds) -> None:
        config = uvicorn.Config(
            app,
            http=bounded(replace(bounds, max_http_connections=_affordable(bounds.max_http_connections))),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None
        self._socket: socket.socket | None = None

    async def start(self, address: str) -> str:
        """Listen on HOST:PORT, port 0 taking a free one; the bound HOST:PORT.

        Raises:
            StartError: the address is no HOST:PORT or can not be bound.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise StartError(f"http: {address!r} is not HOST:PORT")
        bare = host.strip("[]")
        try:
            self._socket = socket.create_server(
                (bare, int(port)), family=socket.AF_INET6 if ":" in bare else socket.AF_INET, backlog=2048
            )
        except (OSError, OverflowError) as error:
            raise StartError(f"http: can not listen on {address}: {error}") from error
        # A small write would wait for the client's delayed acknowledgement of the one before, 40 ms. Connections inherit it;
        # asyncio sets it only where a socket names its protocol, and this one does not.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._task.done():  # noqa: ASYNC110 - uvicorn tells by this flag alone
            await asyncio.sleep(0.001)
        return f"{host}:{self._socket.getsockname()[1]}"

    async def close(self) -> None:
        """End connections and give the port back. Idempotent."""
        if self._task is not None:
            self._server.should_exit = True
            await self._task
            self._task = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
