"""OpenAI's bodies to what the core speaks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.common.errors import InvalidRequest
from penstock.gateway.http_door.schemas import ChatBody, ChatTurn, CompletionBody, SharedBody
from penstock.gateway.request import Generation, Message, Reporting, Sampling, Stopping

__all__ = ["chat", "completions", "messages"]

# OpenAI's own default for completions; a chat goes on to the end of the context.
_COMPLETION_TOKENS = 16
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def completions(body: CompletionBody) -> list[Generation]:
    """One generation for each prompt.

    Raises:
        InvalidRequest: fields do not go together.
    """
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None and prompt_logprobs is None:
        prompt_logprobs = body.logprobs  # OpenAI's form tells both as one list
    reporting = _reporting(body, body.logprobs, prompt_logprobs, echo=bool(body.echo))
    shared = _shared(body, _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens, reporting)
    return [Generation(**prompt, **shared) for prompt in _prompts(body.prompt)]


def chat(body: ChatBody) -> list[Generation]:
    """The one generation of a chat.

    Raises:
        InvalidRequest: a part of a message is no text, or fields do not go together.
    """
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest.field("top_logprobs", "needs logprobs to be true")
    both = (body.max_tokens, body.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise InvalidRequest.field("max_tokens", "differs from max_completion_tokens; give one of them")
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    reporting = _reporting(body, (body.top_logprobs or 0) if body.logprobs else None, body.prompt_logprobs, echo=False)
    return [
        Generation(
            messages=messages(body.messages),
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message or False,
            chat_template_kwargs=body.chat_template_kwargs or {},
            **_shared(body, max_tokens, reporting),
        )
    ]


def messages(turns: Sequence[ChatTurn]) -> list[Message]:
    """A conversation's turns; text parts are joined by line breaks.

    Raises:
        InvalidRequest: a part is no text, or there is nothing where only an answer may be empty.
    """
    for i, turn in enumerate(turns):
        if turn.content is None and turn.role != "assistant":
            raise InvalidRequest.field(f"messages[{i}].content", "must be a text or a list of text parts")
    return [Message(turn.role, _content(turn.content, f"messages[{i}].content"), turn.name or "") for i, turn in enumerate(turns)]


def _content(content: str | Sequence[Mapping[str, Any]] | None, field: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for i, part in enumerate(content):
        text = part.get("text")
        if part.get("type") != "text" or not isinstance(text, str):
            raise InvalidRequest.field(f"{field}[{i}]", 'only {"type": "text", "text": …} parts are supported')
        texts.append(text)
    return "\n".join(texts)


def _prompts(prompt: str | Sequence[Any]) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        return [{"text": prompt}]
    if not prompt:
        raise InvalidRequest.field("prompt", "is empty; give at least one prompt")
    if isinstance(prompt[0], int):
        return [{"token_ids": prompt}]
    return [{"text": p} if isinstance(p, str) else {"token_ids": p} for p in prompt]


def _shared(body: SharedBody, max_tokens: int | None, reporting: Reporting) -> dict[str, Any]:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest.field("stream_options", "is for streams; set stream, or leave it out")
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return {
        "model": body.model or "",
        "sampling": Sampling(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=0 if body.top_k == -1 else body.top_k,  # vLLM's way to say all
            min_p=body.min_p,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            logit_bias=_logit_bias(body.logit_bias or {}),
            # OpenAI's seeds are signed.
            seed=body.seed % 2**64 if body.seed is not None and -(2**63) <= body.seed < 0 else body.seed,
        ),
        "stopping": Stopping(
            max_tokens=max_tokens,
            min_tokens=body.min_tokens,
            stop=stop,
            stop_token_ids=body.stop_token_ids or (),
            ignore_eos=bool(body.ignore_eos),
            include_stop_text=bool(body.include_stop_str_in_output),
        ),
        "reporting": reporting,
        "n": 1 if body.n is None else body.n,
        "priority": body.priority or 0,
        "cache_salt": body.cache_salt or "",
    }


def _reporting(body: SharedBody, logprobs: int | None, prompt_logprobs: int | None, *, echo: bool) -> Reporting:
    return Reporting(
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        token_ids=bool(body.return_token_ids),
        echo=echo,
        special_tokens=body.skip_special_tokens is False,
    )


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    biases = {}
    for key, bias in given.items():
        if not _TOKEN_ID.fullmatch(key):
            raise InvalidRequest.field("logit_bias", f"keys are token ids in plain decimal; {key[:24]!r} is none")
        biases[int(key)] = bias
    return biases
