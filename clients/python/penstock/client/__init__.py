"""Python client of Penstock's gRPC API, async and sync.

with Client("127.0.0.1:8001") as client:
    with client.chat([Message("user", "Hello")], max_tokens=64) as stream:
        for event in stream:
            print(event.text, end="")
"""

from penstock.client._async import AsyncClient, AsyncStream
from penstock.client._options import ChatOptions, Message, Options, Rendering
from penstock.client._results import (
    Alternative,
    Calibration,
    Choice,
    Closing,
    Event,
    Fallback,
    Finish,
    FinishReason,
    Handoff,
    Model,
    ModelExecutor,
    Placement,
    PlacementReason,
    Result,
    TokenCount,
    TokenLogprob,
    Usage,
)
from penstock.client._sync import Client, Stream
from penstock.client.errors import (
    Cancelled,
    ClientClosed,
    ContextOverflow,
    DeadlineExceeded,
    FieldViolation,
    InternalError,
    InvalidRequest,
    Overloaded,
    PenstockError,
    RequestTooLarge,
    StreamConsumed,
    Unauthenticated,
    Unavailable,
    UnknownModel,
    UnsupportedField,
)

__all__ = [
    "Alternative",
    "AsyncClient",
    "AsyncStream",
    "Calibration",
    "Cancelled",
    "ChatOptions",
    "Choice",
    "Client",
    "ClientClosed",
    "Closing",
    "ContextOverflow",
    "DeadlineExceeded",
    "Event",
    "Fallback",
    "FieldViolation",
    "Finish",
    "FinishReason",
    "Handoff",
    "InternalError",
    "InvalidRequest",
    "Message",
    "Model",
    "ModelExecutor",
    "Options",
    "Overloaded",
    "PenstockError",
    "Placement",
    "PlacementReason",
    "Rendering",
    "RequestTooLarge",
    "Result",
    "Stream",
    "StreamConsumed",
    "TokenCount",
    "TokenLogprob",
    "Unauthenticated",
    "Unavailable",
    "UnknownModel",
    "UnsupportedField",
    "Usage",
]
