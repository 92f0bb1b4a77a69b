"""What can go wrong with a request, as exceptions; one table says what each is over gRPC, another what a status is over HTTP.

    PenstockError
    ├── InvalidRequest          a field is wrong; names the field and what would be right
    │   ├── UnsupportedField    the field is right, but not supported here, or by no live executor
    │   └── ContextOverflow     prompt and answer are longer than the model's context
    ├── UnknownModel
    ├── UnknownExecutor
    ├── Unauthenticated
    ├── RequestTooLarge
    ├── Overloaded              try again after `retry_after` seconds
    ├── DeadlineExceeded
    ├── Cancelled
    ├── Unavailable             a service that the request needs is not there; may say when to try again
    └── InternalError           a defect; the text is logged and never sent

The text of every exception but InternalError is written for the client.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

__all__ = [
    "HTTP_STATUS",
    "MAX_VIOLATIONS",
    "STATUS",
    "Cancelled",
    "ContextOverflow",
    "DeadlineExceeded",
    "FieldViolation",
    "InternalError",
    "InvalidRequest",
    "Overloaded",
    "PenstockError",
    "RequestTooLarge",
    "Unauthenticated",
    "Unavailable",
    "UnknownExecutor",
    "UnknownModel",
    "UnsupportedField",
    "error_from_status",
    "status_of",
]


# Violations that one error tells; of more, their number.
MAX_VIOLATIONS = 8
# A status travels in metadata, of which gRPC takes 8 KiB: the message there is percent-encoded, and stands once more, with the
# violations, in details that are Base64.
_MESSAGE_BYTES = 1000
_FIELD_BYTES = 96
_VIOLATIONS_BYTES = 2400


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field: its public path, such as ``sampling.top_p``, and what would be right."""

    field: str
    description: str


class PenstockError(Exception):
    """Base of all that a request can fail with.

    Attributes:
        request_id: the id under which the server's logs have the call; empty where no server told one.
    """

    request_id: str = ""


class InvalidRequest(PenstockError):
    """One or more fields of a request are wrong. Of many, the first are kept; `more` counts the others."""

    def __init__(self, *violations: FieldViolation) -> None:
        self.violations = violations[:MAX_VIOLATIONS]
        self.more = len(violations) - len(self.violations)
        super().__init__(self.message((v.field, v.description) for v in self.violations))

    def message(self, named: Iterable[tuple[str, str]]) -> str:
        """The violations as one text, under these names."""
        text = "; ".join(f"{field}: {description}" for field, description in named)
        return f"{text}; and {self.more} more" if self.more else text

    @classmethod
    def field(cls, field: str, description: str) -> InvalidRequest:
        """The error for a single field."""
        return cls(FieldViolation(field, description))


class UnsupportedField(InvalidRequest):
    """A field that is right in itself, which is not supported here, or by no live executor of the model."""


class ContextOverflow(InvalidRequest):
    """Prompt and answer are longer than the model's context: what a client may mend by leaving out a part of the prompt."""

    def of_context(self, tokens: int) -> ContextOverflow:
        """The same, with the context's length, in OpenAI's and vLLM's words: LiteLLM and others know the error by these alone."""
        length = f"this model's maximum context length is {tokens} tokens"
        return ContextOverflow(*(FieldViolation(v.field, f"{v.description}; {length}") for v in self.violations))


class UnknownModel(PenstockError):
    """No executor serves a model of this name."""


class UnknownExecutor(PenstockError):
    """No executor of this id lives."""


class Unauthenticated(PenstockError):
    """The request bears no known credential."""


class RequestTooLarge(PenstockError):
    """The request's body is larger than the door takes."""


class Overloaded(PenstockError):
    """The service has as much work as it takes; `retry_after` in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(PenstockError):
    """The request's deadline passed before it began to answer."""


class Cancelled(PenstockError):
    """The client does not want the answer any more."""


class Unavailable(PenstockError):
    """A service that the request needs is not there now; `retry_after` in seconds, where it is expected back."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class InternalError(PenstockError):
    """A defect. The text is for the log; clients get a fixed sentence."""


STATUS: Mapping[type[PenstockError], grpc.StatusCode] = {
    UnsupportedField: grpc.StatusCode.INVALID_ARGUMENT,
    ContextOverflow: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownExecutor: grpc.StatusCode.NOT_FOUND,
    UnknownModel: grpc.StatusCode.NOT_FOUND,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    RequestTooLarge: grpc.StatusCode.OUT_OF_RANGE,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cancelled: grpc.StatusCode.CANCELLED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    InternalError: grpc.StatusCode.INTERNAL,
}

HTTP_STATUS: Mapping[grpc.StatusCode, int] = {
    grpc.StatusCode.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    grpc.StatusCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    grpc.StatusCode.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    grpc.StatusCode.OUT_OF_RANGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    grpc.StatusCode.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
    grpc.StatusCode.CANCELLED: 499,  # nginx's "client closed request", which HTTPStatus does not know
    grpc.StatusCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    grpc.StatusCode.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
}

# Errors of one status that a client can tell apart by google.rpc.ErrorInfo.
_REASONS: Mapping[type[InvalidRequest], str] = {
    UnsupportedField: "UNSUPPORTED_FIELD",
    ContextOverflow: "CONTEXT_OVERFLOW",
}
_DOMAIN = "penstock.v1"

_INTERNAL_MESSAGE = "internal error; the server's log has the details under this request's id"
_CODE_NUMBER = {code: code.value[0] for code in grpc.StatusCode}


def status_of(error: BaseException) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """The gRPC code and the full status, details included, that an exception is told as."""
    kind = next((k for k in type(error).__mro__ if k in STATUS), InternalError)
    code = STATUS[kind]
    message = _INTERNAL_MESSAGE if kind is InternalError else str(error)
    status = status_pb2.Status(code=_CODE_NUMBER[code], message=_clip(message, _MESSAGE_BYTES))
    details: list[Message] = []
    if isinstance(error, InvalidRequest):
        room = _VIOLATIONS_BYTES // max(1, len(error.violations)) - _FIELD_BYTES
        named = [(_clip(v.field, _FIELD_BYTES), _clip(v.description, room)) for v in error.violations]
        violations = [error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in named]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
        if type(error) in _REASONS:
            details.append(error_details_pb2.ErrorInfo(reason=_REASONS[type(error)], domain=_DOMAIN))
    elif isinstance(error, Overloaded | Unavailable) and error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        status.details.add().Pack(detail)
    return code, status


def _clip(text: str, most: int) -> str:
    """As much of a text as fits into so many bytes of UTF-8."""
    content = text.encode(errors="replace")
    return content.decode() if len(content) <= most else content[: most - 3].decode(errors="ignore") + "…"


def error_from_status(code: grpc.StatusCode, status: status_pb2.Status) -> PenstockError:
    """The exception that a peer's status tells: `status_of` the other way."""
    for packed in status.details:
        bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if packed.Unpack(bad):
            return _invalid(status)(*(FieldViolation(v.field, v.description) for v in bad.field_violations))
        if packed.Unpack(retry):
            again = Unavailable if code is grpc.StatusCode.UNAVAILABLE else Overloaded
            return again(status.message, retry.retry_delay.ToTimedelta().total_seconds())
    kind = {v: k for k, v in STATUS.items() if k not in {*_REASONS, UnknownExecutor}}.get(code, InternalError)
    if kind is InvalidRequest:
        return InvalidRequest.field("request", status.message)
    if kind is Overloaded:
        return Overloaded(status.message, 1.0)
    if status.code == code_pb2.UNKNOWN:
        return InternalError(status.message)
    return kind(status.message)


def _invalid(status: status_pb2.Status) -> type[InvalidRequest]:
    """Which of its kinds a status with violations tells."""
    info = error_details_pb2.ErrorInfo()
    reasons = {info.reason for packed in status.details if packed.Unpack(info) and info.domain == _DOMAIN}
    return next((kind for kind, reason in _REASONS.items() if reason in reasons), InvalidRequest)
