"""What both clients set on their channels and calls: retries, deadlines, credentials, metadata."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Mapping

import grpc

from penstock.client.errors import InvalidRequest, retry_delay
from penstock.common.addresses import host_and_port

__all__ = ["TLS", "Attempts", "Metadata", "channel_options", "checked_target", "credentials", "metadata"]

TLS = bool | bytes | grpc.ChannelCredentials
Metadata = tuple[tuple[str, str], ...]

_MAX_MESSAGE_BYTES = 64 << 20
_MAX_DELAY_SECONDS = 30.0
# https://github.com/grpc/grpc/blob/master/doc/naming.md, and what gRPC's core has beside them
_SCHEMES = frozenset({"dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds", "google-c2p"})
# https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md: ASCII-Value
_UNFIT = re.compile(r"[^ -~]")


def checked_target(target: str) -> str:
    """The target, where gRPC can make something of it: it tells what it can not as a server that is away.

    Raises:
        ValueError: it is neither HOST:PORT nor has it one of gRPC's schemes; says so.
    """
    if target.partition(":")[0] not in _SCHEMES:
        try:
            host_and_port(target)
        except ValueError:
            right = "HOST:PORT of a gRPC door, or a target with a scheme of gRPC such as dns:///HOST:PORT"
            raise ValueError(f"target: must be {right}, and is {target!r}") from None
    return target


def channel_options(retries: int) -> list[tuple[str, int | str]]:
    """Channel arguments. gRPC itself tries a call again that was UNAVAILABLE, as long as no answer to it has begun.

    See https://github.com/grpc/proposal/blob/master/A6-client-retries.md; it caps attempts at five.
    """
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),  # which decides where gRPC has both
    ]
    if retries < 1:
        return [*options, ("grpc.enable_retries", 0)]
    policy = {
        "maxAttempts": min(retries, 4) + 1,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    names = [{"service": "penstock.v1.Inference"}, {"service": "penstock.v1.Models"}]
    return [*options, ("grpc.service_config", json.dumps({"methodConfig": [{"name": names, "retryPolicy": policy}]}))]


def credentials(tls: TLS) -> grpc.ChannelCredentials | None:
    """Credentials of a channel; None where it is plain.

    Args:
        tls: False: plain; True: TLS with the system's roots; bytes: TLS with these roots (PEM); or credentials of the caller's own.
    """
    if isinstance(tls, grpc.ChannelCredentials):
        return tls
    if isinstance(tls, bytes):
        return grpc.ssl_channel_credentials(root_certificates=tls)
    return grpc.ssl_channel_credentials() if tls else None


def metadata(api_key: str | None, options: Mapping[str, object]) -> Metadata:
    """Metadata of a call.

    Raises:
        InvalidRequest: a value can not be metadata; names the field.
    """
    entries: list[tuple[str, str]] = []
    if api_key is not None:
        entries.append(("authorization", f"Bearer {_fit('api_key', api_key)}"))
    if (request_id := options.get("request_id")) is not None:
        entries.append(("x-request-id", _fit("request_id", request_id)))
    return tuple(entries)


def _fit(field: str, value: object) -> str:
    text = str(value)
    if _UNFIT.search(text):  # which is not told: it may be a secret
        raise InvalidRequest.field(field, "must be printable ASCII, in one line: metadata holds nothing else")
    return text


class Attempts:
    """Deadline and retries of one call that may be made several times, until its first answer.

    Args:
        timeout: seconds for all attempts together; None: no end.
        retries: attempts beyond the first, where the server was overloaded and said when to come again.
    """

    def __init__(self, timeout: float | None, retries: int) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout
        self._left = retries
        self._doubled = 1.0

    def remaining(self) -> float | None:
        """Seconds that are left; None for no end."""
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)

    def delay(self, error: grpc.RpcError) -> float | None:
        """Seconds to wait before the next attempt; None if there should be none."""
        asked = retry_delay(error)
        remaining = self.remaining()
        if asked is None or self._left < 1:
            return None
        # Apart from one another, so that all whom one server refused do not come back at once.
        delay = min(asked * self._doubled, _MAX_DELAY_SECONDS) * random.uniform(1.0, 1.25)  # noqa: S311 - not a secret
        if remaining is not None and delay >= remaining:
            return None
        self._left -= 1
        self._doubled *= 2
        return delay
