"""What a call can fail with; the services raise the same exceptions.

PenstockError
├── InvalidRequest          `violations` names each wrong field and what would be right
│   ├── UnsupportedField    the field is right, but not supported here, or by no live executor
│   └── ContextOverflow     prompt and answer are longer than the model's context
├── UnknownModel
├── Unauthenticated
├── RequestTooLarge
├── Overloaded              try again after `retry_after` seconds
├── DeadlineExceeded
├── Cancelled
├── Unavailable             no server answers at this address, or a service behind it is not there
├── InternalError           a defect of the server, or an answer that is none of Penstock's
├── StreamConsumed          a stream was read a second time
└── ClientClosed            a call of a client that is closed

Each has `request_id`, under which the services' logs have the call; empty where no server told one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import grpc
from google.rpc import status_pb2
from grpc_status import rpc_status

from penstock.common.errors import (
    Cancelled,
    ContextOverflow,
    DeadlineExceeded,
    FieldViolation,
    InternalError,
    InvalidRequest,
    Overloaded,
    PenstockError,
    RequestTooLarge,
    Unauthenticated,
    Unavailable,
    UnknownModel,
    UnsupportedField,
    error_from_status,
)

__all__ = [
    "Cancelled",
    "ClientClosed",
    "ContextOverflow",
    "DeadlineExceeded",
    "FieldViolation",
    "InternalError",
    "InvalidRequest",
    "Overloaded",
    "PenstockError",
    "RequestTooLarge",
    "StreamConsumed",
    "Unauthenticated",
    "Unavailable",
    "UnknownModel",
    "UnsupportedField",
    "from_rpc",
    "retry_delay",
]


_REQUEST_ID_KEY = "x-request-id"


class StreamConsumed(PenstockError):
    """A stream was read a second time. It is read once: keep what `result` returns."""

    def __init__(self) -> None:
        super().__init__("a stream can be read once, and this one has been: keep its events, or what result() returned")


class ClientClosed(PenstockError):
    """A call was begun after its client had been closed, which no call opens again."""

    def __init__(self) -> None:
        super().__init__("the client is closed; make a new one")


def from_rpc(error: grpc.RpcError) -> PenstockError:
    """The exception that a failed call's status, its details and its metadata tell."""
    try:
        status = rpc_status.from_call(error)
    except ValueError:
        # A proxy's details that contradict its status.
        status = None
    if status is None:
        status = status_pb2.Status(code=error.code().value[0], message=error.details() or "")
    told = error_from_status(error.code(), status)
    told.request_id = str(_trailing(error).get(_REQUEST_ID_KEY, ""))
    return told


def retry_delay(error: grpc.RpcError) -> float | None:
    """Seconds after which the server asks for the same call again; None where it does not."""
    read = from_rpc(error)
    return read.retry_after if isinstance(read, Overloaded) and "grpc-status-details-bin" in _trailing(error) else None


def _trailing(error: grpc.RpcError) -> dict[str, str | bytes]:
    return dict(cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ()))  # pairs, whatever the stubs say
