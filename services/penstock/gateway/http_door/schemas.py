"""Bodies of the HTTP door: OpenAI's fields, and vLLM's beyond them. Types are checked here, ranges for both doors elsewhere."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from penstock.common.errors import FieldViolation, InvalidRequest

__all__ = ["ChatBody", "ChatTurn", "CompletionBody", "DetokenizeBody", "SharedBody", "TokenizeBody", "parse"]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SharedBody(_Body):
    """What completions and chats have in common."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionBody(SharedBody):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None


class ChatTurn(_Body):
    """One message. `content` is a text, or parts of ``{"type": "text", "text": …}``."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None


class ChatBody(SharedBody):
    """``POST /v1/chat/completions``."""

    messages: list[ChatTurn]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None


class TokenizeBody(BaseModel):
    """``POST /tokenize``: a prompt or messages."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatTurn] | None = None
    add_generation_prompt: bool | None = None


class DetokenizeBody(BaseModel):
    """``POST /detokenize``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    tokens: list[int]


# Fields of OpenAI's that change nothing here.
_HARMLESS = {
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "refusal",
    "annotations",
}
# Fields of OpenAI's that are not supported, with the values under which they ask for nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "tool_calls": ([],),
    "tool_call_id": (),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "best_of": (1,),
    "suffix": ("",),
}
_EXPECTED = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": "a text or a list of texts",
    "content": "a text or a list of text parts",
}

B = TypeVar("B", bound=BaseModel)


def parse(kind: type[B], body: bytes) -> B:
    """A body as a message of this kind.

    Raises:
        InvalidRequest: it is no JSON object, a type is wrong, or a field is unknown or not supported.
    """
    try:
        told = kind.model_validate_json(body)
    except ValidationError as error:
        raise InvalidRequest(*_violations(error, kind)) from error
    violations = list(_extras(told, ""))
    for i, turn in enumerate(getattr(told, "messages", None) or ()):
        violations += _extras(turn, f"messages[{i}].")
    if violations:
        raise InvalidRequest(*violations)
    return told


def _violations(error: ValidationError, kind: type[BaseModel]) -> list[FieldViolation]:
    found: dict[str, str] = {}
    for told in error.errors(include_url=False, include_context=False, include_input=False):
        location = told["loc"]
        if told["type"] == "json_invalid" or not location:
            return [FieldViolation("body", f"must be one JSON object in valid UTF-8: {told['msg']}")]
        field = _path(location)
        known = _EXPECTED.get(str(location[0]) if len(location) < 3 else str(location[2])) or _EXPECTED.get(str(location[0]))
        if told["type"] == "missing":
            found[field] = "is required"
        elif told["type"] == "extra_forbidden":
            found[field] = _unknown(str(location[-1]), kind.model_fields)
        else:
            found.setdefault(field, f"must be {known}" if known else told["msg"])
    return [FieldViolation(field, text) for field, text in found.items()]


def _path(location: tuple[int | str, ...]) -> str:
    """``messages[3].content`` for a location; of a union's members only the field itself is told."""
    path = str(location[0])
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in {"str", "int", "float", "bool", "dict"}:
            path += f".{part}"
        else:
            break
    return path.partition("[")[0] if str(location[0]) in {"prompt", "stop"} else path


def _extras(told: BaseModel, prefix: str) -> list[FieldViolation]:
    violations = []
    for name, value in (told.model_extra or {}).items():
        if name in _HARMLESS or value is None or value in _NEUTRAL.get(name, ()):
            continue
        why = "is not supported here; leave it out" if name in _NEUTRAL else _unknown(name, type(told).model_fields)
        violations.append(FieldViolation(prefix + name[:64], why))
    return violations


def _unknown(name: str, fields: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, fields, n=1)
    return f"is no field of this request; did you mean {near[0]!r}?" if near else "is no field of this request; leave it out"
