"""What `penstock scale` and `penstock role` share: the control door of a cluster on this machine, and its processes as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import grpc

from penstock.cli.cluster.roles import ROLES_OF_MESSAGES
from penstock.cli.cluster.sockets import find, grpc_target
from penstock.cli.tables import print_table
from penstock.common.config import ConfigError
from penstock.internal.v1 import cluster_pb2 as pb
from penstock.internal.v1 import cluster_pb2_grpc

__all__ = ["control_door", "print_processes", "refusals"]

_HEADINGS = ("process", "role", "state", "pid", "address", "executor")


@contextmanager
def control_door(target: str | None) -> Iterator[cluster_pb2_grpc.ClusterServiceStub]:
    """The control door of the cluster with this gRPC door, or of the only one.

    Raises:
        ConfigError: there is none, or a call of it failed; says why.
    """
    with grpc.insecure_channel(grpc_target(find(target))) as channel, refusals():
        yield cluster_pb2_grpc.ClusterServiceStub(channel)


@contextmanager
def refusals() -> Iterator[None]:
    """What a call fails with leaves as one line, a ConfigError."""
    try:
        yield
    except grpc.RpcError as error:
        raise ConfigError(error.details() or error.code().name) from None


def print_processes(processes: Sequence[pb.Process], *, as_json: bool) -> None:
    """Write them to stdout, as a table or as one JSON list."""
    rows = [
        {
            "process": process.name,
            "role": ROLES_OF_MESSAGES.get(process.role, ""),
            "state": pb.ProcessState.Name(process.state).removeprefix("PROCESS_STATE_").lower(),
            "pid": process.pid,
            "address": process.address,
            "executor": process.executor_id,
        }
        for process in processes
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(_HEADINGS, (tuple(row.values()) for row in rows))
