"""What every service's gRPC server has: channel arguments, interceptors, health with `Watch`, reflection, and a drain."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from penstock.common.addresses import host_and_port
from penstock.common.channel import MAX_MESSAGE_BYTES, server_options
from penstock.common.interceptors import ErrorsToStatuses, RequestIds

__all__ = ["GrpcServer"]

S = TypeVar("S")


class GrpcServer:
    """A gRPC server of the suite. `add` servicers, `listen`, `start`, then `set_serving`; `stop` in the end.

    Health is NOT_SERVING, for the whole server and each service, until `set_serving` says otherwise.
    """

    def __init__(
        self,
        *,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        max_receive_bytes: int = MAX_MESSAGE_BYTES,
        public: bool = False,
    ) -> None:
        self._server = grpc.aio.server(
            interceptors=[RequestIds(), ErrorsToStatuses(), *interceptors],
            options=server_options(max_receive_bytes, public=public),
        )
        self._health = health.aio.HealthServicer()
        self._names: list[str] = []

    def add(self, register: Callable[[S, grpc.aio.Server], None], servicer: S, name: str) -> None:
        """Serve a servicer: its generated ``add_…_to_server``, itself, and its full name, ``penstock.v1.Inference``."""
        register(servicer, self._server)
        self._names.append(name)

    def listen(self, address: str) -> str:
        """Bind HOST:PORT (port 0 takes a free one) and tell the bound HOST:PORT.

        Raises:
            RuntimeError: the address is no HOST:PORT or can not be bound; says which.
        """
        try:
            host, port = host_and_port(address)  # gRPC would take a port modulo 65,536
        except ValueError as error:
            raise RuntimeError(str(error)) from error
        try:
            bound = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise RuntimeError(_why_not_bound(host, port)) from error
        return f"{host}:{bound}"

    async def start(self) -> None:
        """Begin to answer. Health stays NOT_SERVING."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self._server)
        await self.set_serving(serving=False)
        await self._server.start()

    async def set_serving(self, *, serving: bool) -> None:
        """Tell health, of the server (``""``) and of every service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def stop(self, grace: float) -> None:
        """Take no more calls, give the running ones `grace` seconds, then cancel them."""
        await self.set_serving(serving=False)
        await self._server.stop(grace)


def _why_not_bound(host: str, port: int) -> str:
    """What the system says of an address that gRPC could not bind, and tells of nothing but that."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as listener:
                listener.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return "another process has the port, or this machine has no such address"
