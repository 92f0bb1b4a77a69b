"""`penstock health`: one question to a service's gRPC health, for containers and scripts."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from penstock.common.addresses import host_and_port
from penstock.common.config import ConfigError

__all__ = ["health"]


def health(address: str, /, *, service: str = "", timeout: float = 3.0) -> int:
    """Ask whether a server is serving. The status is 0 where it is, and 1 where it is not or does not answer.

    Args:
        address: HOST:PORT of a gRPC server.
        service: Full name of one service of it, such as penstock.v1.Inference; without one, the server as a whole.
        timeout: Seconds to wait for the answer.
    """
    try:
        host_and_port(address)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout)
        except grpc.RpcError as error:
            unknown = service and error.code() is grpc.StatusCode.NOT_FOUND
            why = f"it has no service {service}" if unknown else error.details()
            print(f"{address}: {error.code().name}: {why}", file=sys.stderr)
            return 1
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":  # a container's health check, every few seconds: without the command line's own imports
    sys.exit(health(sys.argv[1]))
