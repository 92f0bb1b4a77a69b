"""What the client commands share: where the suite is, and one line for whatever goes wrong there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from penstock.common.channel import CLIENT_OPTIONS
from penstock.common.config import ConfigError

__all__ = ["Connection", "connected"]


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Where a suite is.

    Attributes:
        target: Its gRPC door, HOST:PORT or grpc://HOST:PORT.
        api_key: Key that the suite knows the caller by, where it wants one.
        timeout: Seconds that the whole answer may take.
    """

    target: str = "127.0.0.1:8001"
    api_key: str | None = None
    timeout: float = 600.0

    @property
    def address(self) -> str:
        """HOST:PORT."""
        scheme, _, rest = self.target.rpartition("://")
        if scheme not in {"", "grpc"}:
            raise ConfigError(f"--target: must be HOST:PORT of a gRPC door, and is {self.target}")
        return rest

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call bears."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()


@contextmanager
def connected(connection: Connection) -> Iterator[grpc.Channel]:
    """A channel to the suite. What calls fail with leaves as one line.

    Raises:
        ConfigError: the call failed; says why.
    """
    with grpc.insecure_channel(connection.address, options=CLIENT_OPTIONS) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            raise ConfigError(_why(connection, error)) from None


def _why(connection: Connection, error: grpc.RpcError) -> str:
    from grpc_status import rpc_status

    from penstock.common.errors import InvalidRequest, error_from_status

    if not isinstance(error, grpc.Call):
        return str(error)
    status = rpc_status.from_call(error)
    if status is not None and status.details:
        told = error_from_status(error.code(), status)
        if isinstance(told, InvalidRequest):
            return str(told)
    if error.code() is grpc.StatusCode.UNAVAILABLE and status is None:
        return f"nothing answers at {connection.address}; is it served? (penstock up MODEL)"
    return f"{error.code().name}: {error.details()}"
