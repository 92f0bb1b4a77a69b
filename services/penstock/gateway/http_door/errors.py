"""Errors in OpenAI's shape, with the field names of its bodies."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from penstock.common.errors import (
    HTTP_STATUS,
    Cancelled,
    ContextOverflow,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PenstockError,
    RequestTooLarge,
    Unauthenticated,
    Unavailable,
    UnknownModel,
    UnsupportedField,
    status_of,
)
from penstock.gateway.access import failed
from penstock.gateway.http_door.body import SlowBody, UnreadResponse

__all__ = ["error_body", "error_response", "public_field"]

_KINDS: tuple[tuple[type[PenstockError], str, str], ...] = (
    (UnsupportedField, "invalid_request_error", "unsupported_parameter"),
    (ContextOverflow, "invalid_request_error", "context_length_exceeded"),
    (InvalidRequest, "invalid_request_error", "invalid_value"),
    (UnknownModel, "invalid_request_error", "model_not_found"),
    (Unauthenticated, "authentication_error", "invalid_api_key"),
    (RequestTooLarge, "invalid_request_error", "request_too_large"),
    (Overloaded, "rate_limit_error", "overloaded"),
    (DeadlineExceeded, "server_error", "deadline_exceeded"),
    (Cancelled, "server_error", "cancelled"),
    (Unavailable, "server_error", "unavailable"),
)
# Of a field's name, and of what is said about it.
_MOST_CHARACTERS = 1000
_RENAMED = {
    "stopping.include_stop_text": "include_stop_str_in_output",
    "reporting.token_ids": "return_token_ids",
    "reporting.special_tokens": "skip_special_tokens",
}
_CHAT_RENAMED = {"reporting.logprobs": "top_logprobs"}


def public_field(field: str, *, chat: bool) -> str:
    """OpenAI's name of a field that is named by its path in ``penstock.v1``."""
    renamed = _RENAMED.get(field) or (_CHAT_RENAMED.get(field) if chat else None)
    if renamed is not None:
        return renamed
    for prefix in ("sampling.", "stopping.", "reporting.", "conversation."):
        if field.startswith(prefix):
            return field.removeprefix(prefix)
    return field


def error_body(error: BaseException, *, chat: bool = False) -> tuple[int, dict[str, Any]]:
    """An error's HTTP status and its body. The access log tells the error too."""
    failed(error)
    code, status = status_of(error)
    kind, name = next(((k, n) for cls, k, n in _KINDS if isinstance(error, cls)), ("server_error", "internal_error"))
    message, param = status.message, None
    if isinstance(error, InvalidRequest):
        fields = [(public_field(v.field, chat=chat), v.description) for v in error.violations]
        message = error.message((field[:_MOST_CHARACTERS], text[:_MOST_CHARACTERS]) for field, text in fields)
        param = fields[0][0][:_MOST_CHARACTERS]
    elif isinstance(error, UnknownModel):
        param = "model"
    return int(HTTP_STATUS[code]), {"error": {"message": message, "type": kind, "param": param, "code": name}}


def error_response(error: BaseException, *, chat: bool = False) -> Response:
    """The same as a response."""
    status, body = error_body(error, chat=chat)
    headers = {}
    if isinstance(error, Overloaded | Unavailable) and error.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    if isinstance(error, RequestTooLarge | SlowBody):
        headers["Connection"] = "close"  # the rest of the body is not read
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    kind = UnreadResponse if isinstance(error, RequestTooLarge) else Response
    return kind(json.dumps(body, ensure_ascii=False), status, headers, media_type="application/json")
