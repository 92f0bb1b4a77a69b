"""Who calls over gRPC, and until when."""

from __future__ import annotations

import time
from typing import Any

import grpc.aio

from penstock.common.interceptors import bound_request_id
from penstock.common.tracing import TRACEPARENT_KEY, traceparent_of
from penstock.gateway.auth import Keys
from penstock.gateway.request import Caller

__all__ = ["bearer_of", "caller_of"]

# So much earlier than the call itself a request's deadline is, at most: what is told at the deadline still reaches the client then.
_TELLING_SHARE, _TELLING_SECONDS = 0.05, 0.1


def caller_of(context: grpc.aio.ServicerContext[Any, Any], keys: Keys, default_deadline_seconds: float) -> Caller:
    """The caller of a call: its tenant by key, its request id as its logs have it, its trace by metadata.

    Its deadline is gRPC's, and a little before it: a client hears nothing any more once its own has passed.

    Raises:
        Unauthenticated: keys are set up, and the call bears none of them.
    """
    now = time.monotonic()
    metadata = dict(context.invocation_metadata() or ())
    # None without a deadline, whatever the published types say.
    left: float | None = context.time_remaining()
    return Caller(
        tenant=keys.tenant(bearer_of(context)),
        request_id=bound_request_id(),
        deadline=now + (default_deadline_seconds if left is None else left - min(_TELLING_SHARE * left, _TELLING_SECONDS)),
        arrived=now,
        traceparent=traceparent_of(metadata.get(TRACEPARENT_KEY)),
    )


def bearer_of(context: grpc.aio.ServicerContext[Any, Any]) -> str | None:
    """What a call's metadata say in ``authorization``."""
    value = dict(context.invocation_metadata() or ()).get("authorization")
    return value.decode(errors="replace") if isinstance(value, bytes) else value
