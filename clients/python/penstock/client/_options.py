"""Options of a call, and the messages that they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict, cast

from penstock.client._fields import filled, put
from penstock.client.errors import InvalidRequest
from penstock.v1 import inference_pb2 as pb

__all__ = [
    "ChatOptions",
    "Message",
    "Options",
    "Prompt",
    "Rendering",
    "chat_request",
    "conversation",
    "count_request",
    "generate_request",
    "prompt_message",
]

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; `name` is the author's, for templates that use one."""

    role: str
    content: str
    name: str = ""


class Options(TypedDict, total=False):
    """Options of `generate` and `chat`; an absent one takes the checkpoint's or the server's default.

    They are the fields of `Sampling`, `Stopping`, `Reporting` and the request in ``penstock/v1/inference.proto``, which says what
    each means and may be. `timeout` is the deadline of the whole call, in seconds; `request_id` stands in all services' logs.
    """

    model: str
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop_text: bool
    logprobs: int
    prompt_logprobs: int
    token_ids: bool
    echo: bool
    special_tokens: bool
    n: int
    priority: int
    cache_salt: str
    timeout: float | None
    request_id: str


class Rendering(TypedDict, total=False):
    """How a conversation becomes a prompt: the fields of `Conversation` beside its messages."""

    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template_kwargs: Mapping[str, str | float | bool | None] | None


class ChatOptions(Options, Rendering, total=False):
    """Options of `chat`."""


# Sequences of whole numbers as well, which nobody means as token ids.
_BYTES = (bytes, bytearray, memoryview)
_OF_THE_CALL = {"timeout", "request_id"}
_OF_THE_REQUEST = {"model", "n", "priority", "cache_salt"}
_GROUPS: dict[str, type[pb.Sampling | pb.Stopping | pb.Reporting]] = {
    "sampling": pb.Sampling,
    "stopping": pb.Stopping,
    "reporting": pb.Reporting,
}
_GROUP_OF = {field: group for group, message in _GROUPS.items() for field in message.DESCRIPTOR.fields_by_name}


def generate_request(prompt: Prompt, options: Options) -> pb.GenerateRequest:
    """The message of `generate`.

    Raises:
        TypeError: an option is unknown.
        InvalidRequest: a field can not hold its value; names it and what would be right.
    """
    request = filled(pb.GenerateRequest, _of_the_request(options))
    request.MergeFrom(pb.GenerateRequest(prompt=prompt_message(prompt), **_groups(options)))
    return request


def chat_request(messages: Sequence[Message | Mapping[str, str]], options: ChatOptions) -> pb.ChatRequest:
    """The message of `chat`; raises as `generate_request`."""
    rendering = {name: value for name, value in options.items() if name in Rendering.__annotations__}
    others = cast("Options", {name: value for name, value in options.items() if name not in rendering})
    request = filled(pb.ChatRequest, _of_the_request(others))
    request.MergeFrom(pb.ChatRequest(conversation=conversation(messages, rendering), **_groups(others)))
    return request


def count_request(
    prompt: Prompt | Sequence[Message | Mapping[str, str]], rendering: Rendering, *, model: str, token_ids: bool
) -> pb.CountTokensRequest:
    """The message of `count_tokens`: a sequence of ids is a prompt, one of messages a conversation. Raises likewise."""
    request = filled(pb.CountTokensRequest, {"model": model, "token_ids": token_ids})
    if isinstance(prompt, (str, *_BYTES)) or all(isinstance(one, int) for one in prompt):
        if rendering:
            raise InvalidRequest.field(next(iter(rendering)), "is for a conversation; this is a prompt")
        request.prompt.CopyFrom(prompt_message(cast("Prompt", prompt)))  # the checker knows nothing of all()
        return request
    messages = [one for one in prompt if isinstance(one, (Message, Mapping))]
    if len(messages) < len(prompt):
        raise InvalidRequest.field("prompt", "must be a text, a sequence of token ids, or a sequence of messages")
    request.conversation.CopyFrom(conversation(messages, rendering))
    return request


def prompt_message(prompt: Prompt) -> pb.Prompt:
    """A prompt given as text or as token ids; raises as `generate_request`."""
    message = pb.Prompt()
    if isinstance(prompt, _BYTES):
        kind = type(prompt).__name__
        raise InvalidRequest.field("prompt", f"must be a text or a sequence of token ids, and is {kind}: decode it, or give a list")
    if isinstance(prompt, str):
        put(message, "text", prompt, "prompt")
    else:
        put(message.token_ids, "ids", prompt, "prompt")
        message.token_ids.SetInParent()
    return message


def conversation(messages: Sequence[Message | Mapping[str, str]], rendering: Mapping[str, Any]) -> pb.Conversation:
    """A conversation; a message may be a mapping with `role`, `content` and maybe `name`. Raises as `generate_request`."""
    said = filled(pb.Conversation, rendering, "conversation.")
    for index, given in enumerate(messages):
        path = f"conversation.messages[{index}]"
        try:
            one = given if isinstance(given, Message) else Message(**given)
        except TypeError:
            raise InvalidRequest.field(path, "must be a Message, or a mapping with role, content and maybe name") from None
        if one.content is None and one.role != "assistant":  # whose tool calls may stand in place of a text
            raise InvalidRequest.field(f"{path}.content", "must be text, and is None")
        said.messages.append(filled(pb.Message, asdict(one), f"{path}."))
    return said


def _of_the_request(options: Options) -> dict[str, Any]:
    """The options that stand in the request itself."""
    return {name: value for name, value in options.items() if name in _OF_THE_REQUEST}


def _groups(options: Options) -> dict[str, Any]:
    """The messages of the options that stand in one of them."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        if name in _OF_THE_CALL | _OF_THE_REQUEST or (name in _GROUP_OF and value is None):
            continue
        if name not in _GROUP_OF:
            raise TypeError(f"unknown option {name!r}; there are {', '.join(sorted(Options.__annotations__))}")
        groups.setdefault(_GROUP_OF[name], {})[name] = [value] if name == "stop" and isinstance(value, str) else value
    return {group: filled(_GROUPS[group], given, f"{group}.") for group, given in groups.items()}
