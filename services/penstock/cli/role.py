"""`penstock role`: another role for a live executor."""

from __future__ import annotations

import asyncio

from penstock.cli.cluster.pools import Role
from penstock.cli.cluster.readiness import give_role
from penstock.cli.cluster.roles import ROLE_MESSAGES
from penstock.cli.control import control_door, refusals
from penstock.common.addresses import host_and_port
from penstock.common.config import ConfigError
from penstock.internal.v1 import cluster_pb2

__all__ = ["role"]


def role(executor: str, role: Role, /, *, scheduler: str | None = None, target: str | None = None) -> int:
    """Give a live executor another role. What runs on it goes on; a cluster that `penstock up` started keeps the role at restarts.

    Args:
        executor: Its process's name, such as decode-0, in a cluster on this machine; or its id, as penstock models --executors
            tells it.
        role: What it is to do.
        scheduler: HOST:PORT of the scheduler that it is registered with, for one that runs elsewhere; takes the id alone.
        target: HOST:PORT of the gRPC door of the cluster on this machine, where several run.
    """
    if scheduler is not None:
        _tell_scheduler(scheduler, executor, role)
    else:
        with control_door(target) as door:
            request = cluster_pb2.SetExecutorRoleRequest(executor=executor, role=ROLE_MESSAGES[role])
            executor = door.SetExecutorRole(request).process.name
    print(f"{executor}: {role}")
    return 0


def _tell_scheduler(address: str, executor: str, role: Role) -> None:
    try:
        host_and_port(address)
    except ValueError as error:
        raise ConfigError(f"--scheduler: {error}") from None
    with refusals():
        asyncio.run(give_role(address, executor, role))
