"""Bodies of the HTTP door: OpenAI's fields, and vLLM's beyond them. Types are checked here, ranges for both doors elsewhere."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, PlainValidator, ValidationError
from pydantic_core import from_json

from penstock.common.errors import MAX_VIOLATIONS, FieldViolation, InvalidRequest, UnsupportedField
from penstock.gateway.bounds import Bounds, check_body

__all__ = ["ChatBody", "ChatTurn", "CompletionBody", "DetokenizeBody", "SharedBody", "StreamOptions", "TokenizeBody", "parse"]


def _prompt(prompt: Any) -> Any:
    """Told apart by its first element; checking a union would try each of its members on each element."""
    if isinstance(prompt, str):
        return prompt
    kinds: set[type] = set(map(type, prompt)) if isinstance(prompt, list) else {object}
    if kinds == {list} and all(set(map(type, ids)) <= {int} for ids in prompt):
        kinds = {int}
    if kinds not in ({int}, {str}, set()):
        raise ValueError("no prompt")
    return prompt


def _content(content: Any) -> Any:
    if (
        content is not None
        and not isinstance(content, str)
        and not (isinstance(content, list) and set(map(type, content)) <= {dict})
    ):
        raise ValueError("no content")
    return content


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
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

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_prompt)]
    echo: bool | None = None
    logprobs: int | None = None


class ChatTurn(_Body):
    """One message. `content` is a text, or parts of ``{"type": "text", "text": …}``."""

    role: str
    content: Annotated[str | list[dict[str, Any]] | None, PlainValidator(_content)] = None
    name: str | None = None


class ChatBody(SharedBody):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatTurn], FailFast()]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None


class TokenizeBody(_Body):
    """``POST /tokenize``: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatTurn] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None


class DetokenizeBody(_Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: Annotated[list[int], FailFast()]


# Fields of OpenAI's and vLLM's that change nothing here.
_HARMLESS = {
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "refusal",
    "annotations",
    "include_reasoning",
}
# Fields of OpenAI's and vLLM's that are not supported, with the values under which they ask for nothing.
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
    "moderation": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "best_of": (1,),
    "suffix": ("",),
    "add_special_tokens": (),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "chat_template": (),
    "documents": ([],),
    "early_stopping": (False,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "mm_processor_kwargs": (),
    "prompt_embeds": (),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "return_token_strs": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
_EXPECTED = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": "a text or a list of texts",
    "content": "a text or a list of text parts",
    "chat_template_kwargs": "an object of texts, numbers, true, false and null",
}
_EXPECTED_OF: Mapping[type[BaseModel], Mapping[str, str]] = {TokenizeBody: {"prompt": "a text"}}
# What others call a field, where no name is like it.
_MEANT = {"max_completion_tokens": "max_tokens", "max_output_tokens": "max_tokens", "max_new_tokens": "max_tokens"}

B = TypeVar("B", bound=BaseModel)


def parse(kind: type[B], body: bytes, bounds: Callable[[object], Bounds]) -> B:
    """A body as a message of this kind. Lengths are checked first, so that a wrong body costs no more than its reading.

    Args:
        kind: of message.
        body: as it came.
        bounds: for the model that it names.

    Raises:
        InvalidRequest: it is no JSON object, something is too many, a type is wrong, or a field is unknown.
        UnsupportedField: all is right but for fields that are not supported.
    """
    try:
        raw = from_json(body)
    except ValueError as error:
        raise _no_object(str(error)) from error
    if not isinstance(raw, dict):
        raise _no_object(f"this is {type(raw).__name__}")
    check_body(raw, bounds(raw.get("model")))
    try:
        parsed = kind.model_validate(raw)
    except ValidationError as error:
        raise InvalidRequest(*_violations(error, kind)) from error
    for prefix, part in _parts(parsed):
        violations = list(_extras(part, prefix))
        if violations:
            known = all(violation.description == _UNSUPPORTED for violation in violations)
            raise (UnsupportedField if known else InvalidRequest)(*violations)
    return parsed


def _no_object(why: str) -> InvalidRequest:
    return InvalidRequest.field("body", f"must be one JSON object in valid UTF-8: {why}")


def _violations(error: ValidationError, kind: type[BaseModel]) -> list[FieldViolation]:
    found: dict[str, str] = {}
    expected = {**_EXPECTED, **_EXPECTED_OF.get(kind, {})}
    for violation in error.errors(include_url=False, include_context=False, include_input=False):
        location = violation["loc"]
        field = _path(location)
        known = expected.get(str(location[0]) if len(location) < 3 else str(location[2])) or expected.get(str(location[0]))
        if violation["type"] == "missing":
            found[field] = "is required"
        elif violation["type"] == "model_type":
            found[field] = "must be an object"
        else:
            found.setdefault(field, f"must be {known}" if known else violation["msg"])
    return [FieldViolation(field, text) for field, text in found.items()]


def _path(location: tuple[int | str, ...]) -> str:
    """``messages[3].content`` for a location; of a union's members only the field itself is told."""
    path = str(location[0])[:64]
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif len(part) <= 64 and part.isidentifier() and part not in {"str", "int", "float", "bool", "dict"}:
            path += f".{part}"
        else:
            break
    return path.partition("[")[0] if str(location[0]) in {"prompt", "stop"} else path


def _parts(body: BaseModel) -> Iterator[tuple[str, BaseModel]]:
    """What may have fields that are not known, with what stands before their names."""
    yield "", body
    if isinstance(options := getattr(body, "stream_options", None), BaseModel):
        yield "stream_options.", options
    for i, turn in enumerate(getattr(body, "messages", None) or ()):
        yield f"messages[{i}].", turn


def _extras(part: BaseModel, prefix: str) -> Iterator[FieldViolation]:
    count = 0
    for name, value in (part.model_extra or {}).items():
        if name in _HARMLESS or value is None or any(_same(value, neutral) for neutral in _NEUTRAL.get(name, ())):
            continue
        why = _UNSUPPORTED
        if name not in _NEUTRAL:
            why = _unknown(name, type(part).model_fields) if count < MAX_VIOLATIONS else _UNKNOWN
        count += 1
        yield FieldViolation(prefix + name[:64], why)


def _same(value: Any, neutral: Any) -> bool:
    """Equality of JSON, where true is not 1."""
    return type(value) is type(neutral) and bool(value == neutral)


_UNSUPPORTED = "is not supported here; leave it out"
_UNKNOWN = "is no field of this request; leave it out"


def _unknown(name: str, fields: Mapping[str, Any]) -> str:
    near = [_MEANT[name]] if _MEANT.get(name) in fields else difflib.get_close_matches(name[:64], fields, n=1)
    return f"is no field of this request; did you mean {near[0]!r}?" if near else _UNKNOWN
