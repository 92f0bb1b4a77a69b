"""From decoded text to what the client is told, each byte of it once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from penstock.common.errors import InternalError, Unavailable
from penstock.gateway.answer import Finish, FinishReason
from penstock.gateway.choice import ids_of
from penstock.gateway.ports import SequenceEnd, Text
from penstock.gateway.transitions.ending import fail, finish, tell_first
from penstock.gateway.transitions.reports import describe_again, named_in_prompt

if TYPE_CHECKING:
    from penstock.gateway.choice import Choice
    from penstock.gateway.machine import Request

__all__ = ["described", "on_text", "reopen"]

_FINISH = {
    SequenceEnd.STOP: FinishReason.STOP,
    SequenceEnd.LENGTH: FinishReason.LENGTH,
    SequenceEnd.DEADLINE: FinishReason.DEADLINE,
}


def on_text(request: Request, choice: Choice, text: Text) -> None:
    """Text has come from the tokenizer."""
    if choice.finish is not None:
        return
    choice.held.append(text)
    _tell_held(request, choice)


def described(request: Request, choice: Choice, tokens: Iterable[bytes]) -> None:
    """The bytes of tokens that texts may wait for."""
    if choice.describing:
        request.tokens.update(zip(choice.describing.popleft(), tokens, strict=False))
    _tell_held(request, choice)


def reopen(request: Request, choice: Choice) -> None:
    """A new tokenizer stream: decode from the first token again; what was told before is dropped by its offset."""
    choice.held.clear()
    request.decoding.open(choice)
    if choice.ended is not None:
        request.decoding.finish(choice.decoding_id)
    describe_again(request, choice)


def _tell_held(request: Request, choice: Choice) -> None:
    while choice.held and choice.finish is None and not _missing(request, choice, choice.held[0]):
        _tell(request, choice, choice.held.popleft())


def _missing(request: Request, choice: Choice, text: Text) -> bool:
    """Whether bytes of tokens that are told with a text are not known yet."""
    known = request.tokens.keys()
    prompt_reports = choice.prompt_reports if not choice.begun else None
    if prompt_reports is not None and not known >= named_in_prompt(request, prompt_reports):
        return True
    return bool(choice.reports) and not known >= ids_of(choice.reports[choice.told_tokens : _told_after(choice, text)])


def _told_after(choice: Choice, text: Text) -> int:
    """Tokens that are told once a text is; a stop token that was not decoded counts with the last text."""
    return len(choice.ids) if text.last and text.stop_index is None else max(text.tokens, choice.told_tokens)


def _tell(request: Request, choice: Choice, text: Text) -> None:
    if text.byte_offset > choice.told_bytes:
        fail(request, InternalError(f"text at byte {text.byte_offset} came where {choice.told_bytes} was due"))
        return
    fresh = choice.untold(text)
    first, end = choice.told_tokens, _told_after(choice, text)
    if not choice.begun:
        _begin(request, choice)
    if request.plan.prompt_only:
        finish(request, choice, Finish(FinishReason.LENGTH))
        return
    choice.told_tokens = end
    reporting = request.plan.reporting
    ids = choice.ids[first:end] if reporting.token_ids else ()
    logprobs = choice.logprobs(first, end, request.tokens) if reporting.logprobs is not None else ()
    if fresh or ids or logprobs:
        tell_first(request)
        request.output.text(choice.index, fresh, ids, logprobs)
    if text.last:
        _end(request, choice, text)


def _begin(request: Request, choice: Choice) -> None:
    """What stands before a choice's first text."""
    choice.begun = True
    if choice.prompt_reports is not None:
        request.output.prompt(choice.index, choice.prompt_logprobs(request.tokens))
    if request.plan.echo is not None:
        request.output.text(choice.index, request.plan.echo, (), ())


def _end(request: Request, choice: Choice, text: Text) -> None:
    """The last text has been told."""
    if text.stop_index is not None:
        finish(request, choice, Finish(FinishReason.STOP_SEQUENCE, stop_text=request.plan.stop[text.stop_index]))
    elif choice.ended is None:
        fail(request, Unavailable("the tokenizer has not this model any more"))
    else:
        reason = _FINISH[choice.ended]
        finish(request, choice, Finish(reason, stop_token_id=choice.stop_token if reason is FinishReason.STOP else None))
