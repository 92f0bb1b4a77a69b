"""Options of a call, and the messages that they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from penstock.v1 import inference_pb2 as pb

__all__ = ["Message", "Options", "Prompt", "chat_request", "conversation", "count_request", "generate_request", "prompt_message"]

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
        TypeError: an option is unknown, or no value of its type.
    """
    return pb.GenerateRequest(prompt=prompt_message(prompt), **_fields(options))


def chat_request(
    messages: Sequence[Message | Mapping[str, str]], options: Options, *, add_generation_prompt: bool | None
) -> pb.ChatRequest:
    """The message of `chat`; raises as `generate_request`."""
    return pb.ChatRequest(conversation=conversation(messages, add_generation_prompt=add_generation_prompt), **_fields(options))


def count_request(prompt: Prompt | Sequence[Message | Mapping[str, str]], *, model: str, token_ids: bool) -> pb.CountTokensRequest:
    """The message of `count_tokens`: a sequence of ids is a prompt, one of messages a conversation."""
    if isinstance(prompt, str) or all(isinstance(one, int) for one in prompt):
        given = prompt if isinstance(prompt, str) else [one for one in prompt if isinstance(one, int)]
        return pb.CountTokensRequest(model=model, prompt=prompt_message(given), token_ids=token_ids)
    messages = [one for one in prompt if isinstance(one, (Message, Mapping))]
    if len(messages) < len(prompt):
        raise TypeError("a prompt is a text, a sequence of token ids, or a sequence of messages")
    return pb.CountTokensRequest(model=model, conversation=conversation(messages, add_generation_prompt=None), token_ids=token_ids)


def prompt_message(prompt: Prompt) -> pb.Prompt:
    """A prompt given as text or as token ids."""
    return pb.Prompt(text=prompt) if isinstance(prompt, str) else pb.Prompt(token_ids=pb.TokenIds(ids=prompt))


def conversation(messages: Sequence[Message | Mapping[str, str]], *, add_generation_prompt: bool | None) -> pb.Conversation:
    """A conversation; a message may be a mapping with `role`, `content` and maybe `name`."""
    given = [m if isinstance(m, Message) else Message(**m) for m in messages]
    return pb.Conversation(
        messages=[pb.Message(role=m.role, content=m.content, name=m.name) for m in given],
        add_generation_prompt=add_generation_prompt,
    )


def _fields(options: Options) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        if value is None or name in _OF_THE_CALL:
            continue
        if name in _OF_THE_REQUEST:
            fields[name] = value
        elif name in _GROUP_OF:
            groups.setdefault(_GROUP_OF[name], {})[name] = [value] if name == "stop" and isinstance(value, str) else value
        else:
            raise TypeError(f"unknown option {name!r}; there are {', '.join(sorted(Options.__annotations__))}")
    return fields | {group: _GROUPS[group](**given) for group, given in groups.items()}
