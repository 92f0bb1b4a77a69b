"""How many of anything a request may hold, checked on what came before any of it is converted: the work is that of a length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.common.errors import ContextOverflow, FieldViolation, InvalidRequest

__all__ = [
    "MAX_BIASES",
    "MAX_COUNTED_TOKENS",
    "MAX_MESSAGES",
    "MAX_STOPS",
    "MAX_STOP_IDS",
    "MAX_TEMPLATE_KWARGS",
    "Bounds",
    "at_most",
    "check_body",
    "check_ids",
]

MAX_STOPS = 16
MAX_STOP_IDS = 64
MAX_BIASES = 1024
MAX_MESSAGES = 4096
MAX_TEMPLATE_KWARGS = 32
# Of a text that is only to be counted, which may be longer than any context.
MAX_COUNTED_TOKENS = 1 << 20
# Over all messages of a body.
_MAX_PARTS = 4096
# Of one object; OpenAI's largest has about 40.
_MAX_FIELDS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a model allows: prompts of one call, and tokens of one prompt, which is no longer than the context."""

    prompts: int
    context: int


def at_most(field: str, count: int, most: int, what: str) -> None:
    """Check one length.

    Raises:
        InvalidRequest: there are more.
    """
    if count > most:
        raise InvalidRequest.field(field, f"at most {most} {what}; these are {count}")


def check_ids(count: int, bounds: Bounds) -> None:
    """Check the length of a prompt of token ids.

    Raises:
        ContextOverflow: the context can not hold them.
    """
    if count > bounds.context:
        violation = FieldViolation("prompt", f"at most {bounds.context} token ids; these are {count}")
        raise ContextOverflow(violation).of_context(bounds.context)


def check_body(body: Mapping[str, Any], bounds: Bounds) -> None:
    """Check the lengths of all that an HTTP body may hold many of. Types are left to whoever reads it.

    Raises:
        InvalidRequest: something is too many.
        ContextOverflow: it is a prompt's token ids.
    """
    at_most("body", len(body), _MAX_FIELDS, "fields")
    for field, most, what in (
        ("stop", MAX_STOPS, "texts"),
        ("stop_token_ids", MAX_STOP_IDS, "ids"),
        ("tokens", MAX_COUNTED_TOKENS, "ids"),
    ):
        _at_most(body, field, list, most, what)
    _at_most(body, "logit_bias", dict, MAX_BIASES, "token ids")
    _at_most(body, "chat_template_kwargs", dict, MAX_TEMPLATE_KWARGS, "names")
    _at_most(body, "stream_options", dict, _MAX_FIELDS, "fields")
    _check_prompt(body.get("prompt"), bounds)
    _check_messages(body.get("messages"))


def _at_most(body: Mapping[str, Any], field: str, kind: type[list[Any] | dict[str, Any]], most: int, what: str) -> None:
    value = body.get(field)
    if isinstance(value, kind):
        at_most(field, len(value), most, what)


def _check_prompt(prompt: Any, bounds: Bounds) -> None:
    if not isinstance(prompt, list) or not prompt:
        return
    if isinstance(prompt[0], int):
        check_ids(len(prompt), bounds)
        return
    at_most("prompt", len(prompt), bounds.prompts, "prompts")
    for one in prompt:
        if isinstance(one, list):
            check_ids(len(one), bounds)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list):
        return
    at_most("messages", len(messages), MAX_MESSAGES, "messages")
    parts = 0
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            return
        at_most(f"messages[{i}]", len(message), _MAX_FIELDS, "fields")
        content = message.get("content")
        parts += len(content) if isinstance(content, list) else 0
    at_most("messages", parts, _MAX_PARTS, "parts of content")
