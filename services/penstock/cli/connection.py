"""What the client commands share: where the suite is, and one line for whatever goes wrong there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from penstock.client import Client, DeadlineExceeded, InternalError, PenstockError, Unauthenticated, Unavailable
from penstock.common.addresses import host_and_port
from penstock.common.config import ConfigError

__all__ = ["Connection", "connected", "no_answer"]


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Where a suite is.

    Attributes:
        target: Its gRPC door, HOST:PORT or grpc://HOST:PORT; grpcs://HOST:PORT where TLS stands before it.
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
        try:
            host_and_port(rest)
        except ValueError:
            scheme = "none"
        if scheme not in {"", "grpc", "grpcs"}:
            raise ConfigError(f"--target: must be HOST:PORT of a gRPC door, and is {self.target}")
        return rest

    @property
    def tls(self) -> bool:
        """Whether what answers there speaks TLS."""
        return self.target.startswith("grpcs://")


@contextmanager
def connected(connection: Connection) -> Iterator[Client]:
    """A client of the suite. What its calls fail with leaves as one line.

    Raises:
        ConfigError: a call failed; says why.
    """
    with Client(connection.address, api_key=connection.api_key, timeout=connection.timeout, tls=connection.tls) as client:
        try:
            yield client
        except Unavailable as error:
            raise ConfigError(f"{connection.address}: {no_answer(str(error))}") from None
        except DeadlineExceeded:
            seconds = connection.timeout
            raise ConfigError(f"--timeout {seconds:g}: the answer was not whole within {seconds:g} s and is broken off") from None
        except Unauthenticated as error:
            raise ConfigError(f"--api-key: {error}") from None
        except InternalError as error:
            where = f"; the services' logs have it under the request id {error.request_id}" if error.request_id else ""
            raise ConfigError(f"{error}{where}") from None
        except PenstockError as error:
            raise ConfigError(str(error)) from None


def no_answer(why: str) -> str:
    """Why nothing answers at a gRPC door's address, in gRPC's words, and what to do about it."""
    if "Failed parsing HTTP/2" in why:
        return "what answers there is no gRPC door, perhaps the HTTP one; give the address that penstock up tells as grpc=HOST:PORT"
    return f"{why}; is a model served there? (penstock up MODEL)"
