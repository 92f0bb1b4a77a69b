"""Who calls over gRPC, and until when."""

from __future__ import annotations

import time
from typing import Any

import grpc.aio

from penstock.common.interceptors import bound_request_id
from penstock.common.tracing import TRACEPARENT_KEY, traceparent_of
from penstock.gateway.auth import Keys
from penstock.gateway.request import Caller

__all__ = ["caller_of"]


def caller_of(context: grpc.aio.ServicerContext[Any, Any], keys: Keys, default_deadline_seconds: float) -> Caller:
    """The caller of a call: its tenant by key, its request id as its logs have it, its trace by metadata, its deadline by gRPC.

    Raises:
        Unauthenticated: keys are set up, and the call bears none of them.
    """
    now = time.monotonic()
    metadata = dict(context.invocation_metadata() or ())
    # None without a deadline, whatever the published types say.
    left: float | None = context.time_remaining()
    return Caller(
        tenant=keys.tenant(_text(metadata.get("authorization"))),
        request_id=bound_request_id(),
        deadline=now + (default_deadline_seconds if left is None else left),
        arrived=now,
        traceparent=traceparent_of(metadata.get(TRACEPARENT_KEY)),
    )


def _text(value: str | bytes | None) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
