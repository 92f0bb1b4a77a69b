"""A running cluster's control door: gRPC on a Unix socket, for `penstock scale` and `penstock role`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from penstock.cli.cluster.console import Console
from penstock.cli.cluster.executors import Executors
from penstock.cli.cluster.group import Group
from penstock.cli.cluster.member import State
from penstock.cli.cluster.pools import Role
from penstock.cli.cluster.roles import ROLE_MESSAGES, ROLES_OF_MESSAGES
from penstock.cli.cluster.sockets import grpc_target
from penstock.common.config import ConfigError
from penstock.common.service import StartError
from penstock.internal.v1 import cluster_pb2 as pb
from penstock.internal.v1 import cluster_pb2_grpc, scheduler_pb2

__all__ = ["ClusterServicer"]

_STATES = {
    State.STARTING: pb.PROCESS_STATE_STARTING,
    State.RUNNING: pb.PROCESS_STATE_RUNNING,
    State.RESTARTING: pb.PROCESS_STATE_RESTARTING,
    State.LEAVING: pb.PROCESS_STATE_LEAVING,
}

# For those who wait for a change, to be told that it will not be.
_LAST_WORDS_SECONDS = 0.5

Context = grpc.aio.ServicerContext[Any, Any]


class ClusterServicer(cluster_pb2_grpc.ClusterServiceServicer):
    """`penstock.internal.v1.ClusterService` over a group and its executors. `open` it, and `close` it before the group ends."""

    def __init__(self, group: Group, executors: Executors, console: Console, endpoints: Mapping[str, str]) -> None:
        self._group = group
        self._executors = executors
        self._console = console
        self._endpoints = endpoints
        self._server = grpc.aio.server()
        self._changes: set[asyncio.Task[None]] = set()

    async def open(self, path: Path) -> None:
        """Serve on this socket."""
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(grpc_target(path))
        await self._server.start()

    async def close(self) -> None:
        """Take no more calls, and leave what is half done to the group's end."""
        for change in self._changes:
            change.cancel()
        await asyncio.gather(*self._changes, return_exceptions=True)
        await self._server.stop(_LAST_WORDS_SECONDS)

    async def GetCluster(self, request: pb.GetClusterRequest, context: Context) -> pb.GetClusterResponse:
        return pb.GetClusterResponse(**self._endpoints, processes=await self._processes())

    async def Scale(self, request: pb.ScaleRequest, context: Context) -> AsyncIterator[pb.ScaleResponse]:
        wanted: dict[Role, int] = {role: getattr(request, role) for role in ROLE_MESSAGES if request.HasField(role)}
        events: asyncio.Queue[str | None] = asyncio.Queue()

        def tell(event: str) -> None:
            self._console.line("up", event)
            events.put_nowait(event)

        # On its own: a caller that leaves must not leave the cluster between two sizes.
        change = asyncio.create_task(self._executors.scale(wanted, tell))
        self._changes.add(change)
        change.add_done_callback(self._changes.discard)
        change.add_done_callback(lambda _: events.put_nowait(None))
        while (event := await events.get()) is not None:
            yield pb.ScaleResponse(event=event)
        async with _refusals(context):
            change.result()
        yield pb.ScaleResponse(processes=await self._processes())

    async def SetExecutorRole(self, request: pb.SetExecutorRoleRequest, context: Context) -> pb.SetExecutorRoleResponse:
        async with _refusals(context):
            if request.role not in ROLES_OF_MESSAGES:
                raise ConfigError(f"ROLE: must be one of {', '.join(ROLE_MESSAGES)}")
            name = await self._executors.set_role(request.executor, ROLES_OF_MESSAGES[request.role])
        self._console.line("up", f"{name} has another role: {ROLES_OF_MESSAGES[request.role]}")
        return pb.SetExecutorRoleResponse(process=next(p for p in await self._processes() if p.name == name))

    async def _processes(self) -> list[pb.Process]:
        ids, planned = await self._executors.ids(), self._executors.planned
        return [
            pb.Process(
                name=name,
                service=member.program.service,
                state=_STATES[member.state],
                pid=member.pid or 0,
                address=member.bound.get("grpc", ""),
                role=ROLE_MESSAGES[planned[name].role] if name in planned else scheduler_pb2.ROLE_UNSPECIFIED,
                executor_id=ids.get(name, ""),
            )
            for name, member in self._group.members.items()
        ]


@contextlib.asynccontextmanager
async def _refusals(context: Context) -> AsyncIterator[None]:
    """What a change can fail with, as statuses with one line each."""
    try:
        yield
    except ConfigError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except StartError as error:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except grpc.aio.AioRpcError as error:
        await context.abort(error.code(), error.details() or "")
    except asyncio.CancelledError:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the cluster ends")
