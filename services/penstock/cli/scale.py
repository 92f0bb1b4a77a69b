"""`penstock scale`: more or fewer executors for a cluster that runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter

from penstock.cli.cluster.pools import Role, check_counts
from penstock.cli.control import control_door, print_processes
from penstock.internal.v1 import cluster_pb2 as pb
from penstock.internal.v1 import cluster_pb2_grpc

__all__ = ["scale"]


def scale(
    *,
    prefill: int | None = None,
    decode: int | None = None,
    workers: int | None = None,
    target: str | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Have so many executors of each role in a cluster that `penstock up` started on this machine.

    Newcomers join and serve before anybody leaves; then the latest leave, each once what runs on it has finished. Ctrl-C stops the
    waiting and not the work. Without a number it shows the processes.

    Args:
        prefill: Executors for prefill.
        decode: Executors for decoding.
        workers: Executors for both.
        target: HOST:PORT of the cluster's gRPC door, where several run.
        as_json: One JSON list of the processes instead of a table.
    """
    wanted: dict[Role, int | None] = {"prefill": prefill, "decode": decode, "both": workers}
    given = {role: count for role, count in wanted.items() if count is not None}
    check_counts(given)
    with control_door(target) as door:
        processes = _scaled(door, given) if given else door.GetCluster(pb.GetClusterRequest()).processes
        print_processes(processes, as_json=as_json)
    return 0


def _scaled(door: cluster_pb2_grpc.ClusterServiceStub, counts: dict[Role, int]) -> Sequence[pb.Process]:
    """The processes, once there are so many. Meanwhile stderr gets what happens."""
    processes: Sequence[pb.Process] = ()
    for response in door.Scale(pb.ScaleRequest(**counts)):
        if response.event:
            print(response.event, file=sys.stderr, flush=True)
        processes = response.processes
    return processes
