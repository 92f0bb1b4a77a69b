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
"""

from __future__ import annotations

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


class StreamConsumed(PenstockError):
    """A stream was read a second time. It is read once: keep what `result` returns."""

    def __init__(self) -> None:
        super().__init__("a stream can be read once, and this one has been: keep its events, or what result() returned")


class ClientClosed(PenstockError):
    """A call was begun after its client had been closed, which no call opens again."""

    def __init__(self) -> None:
        super().__init__("the client is closed; make a new one")


def from_rpc(error: grpc.RpcError) -> PenstockError:
    """The exception that a failed call's status and its details tell."""
    try:
        status = rpc_status.from_call(error)
    except ValueError:
        # A proxy's details that contradict its status.
        status = None
    if status is None:
        status = status_pb2.Status(code=error.code().value[0], message=error.details() or "")
    return error_from_status(error.code(), status)


def retry_delay(error: grpc.RpcError) -> float | None:
    """Seconds after which the server asks for the same call again; None where it does not."""
    read = from_rpc(error)
    has_details = any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())  # type: ignore[misc, has-type]  # pairs, whatever the stubs say
    return read.retry_after if isinstance(read, Overloaded) and has_details else None
