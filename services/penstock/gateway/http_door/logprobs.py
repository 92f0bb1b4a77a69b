"""Log-probabilities in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.gateway.answer import Logprob

__all__ = ["CompletionLogprobs", "chat_logprobs", "prompt_logprobs"]


def token_text(token: bytes) -> str:
    """A token alone; a part of a character shows as U+FFFD, and its `bytes` tell it exactly."""
    return token.decode(errors="replace")


def chat_logprobs(told: Sequence[Logprob]) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat."""
    return {
        "content": [
            {**_entry(p.token, p.logprob), "top_logprobs": [_entry(a.token, a.logprob) for a in p.alternatives]} for p in told
        ],
        "refusal": None,
    }


def _entry(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token_text(token), "logprob": logprob, "bytes": list(token)}


def prompt_logprobs(told: Sequence[Logprob]) -> list[dict[str, Any] | None]:
    """``prompt_logprobs`` as vLLM tells them: for each prompt token what is known of it and of the likely ones, by token id."""
    return [None, *({str(i): entry for i, entry in _ranked(p)} for p in told)]


def _ranked(told: Logprob) -> list[tuple[int, dict[str, Any]]]:
    likely = [
        (a.token_id, {"logprob": a.logprob, "rank": rank, "decoded_token": token_text(a.token)})
        for rank, a in enumerate(told.alternatives, 1)
    ]
    return [*likely, (told.token_id, {"logprob": told.logprob, "rank": told.rank, "decoded_token": token_text(told.token)})]


class CompletionLogprobs:
    """``choices[].logprobs`` of a completion's choice, whose offsets go on from chunk to chunk."""

    def __init__(self) -> None:
        self._offset = 0

    def prompt(self, text: str, told: Sequence[Logprob]) -> dict[str, Any]:
        """Those of an echoed prompt; nothing is known of its first token."""
        rest = sum(len(token_text(p.token)) for p in told)
        form = _columns()
        self._add(form, text[: max(0, len(text) - rest)], None, None)
        for p in told:
            self._add_logprob(form, p)
        return form

    def output(self, told: Sequence[Logprob], form: dict[str, Any] | None = None) -> dict[str, Any]:
        """Those of output tokens, behind those of a form that was begun."""
        form = form if form is not None else _columns()
        for p in told:
            self._add_logprob(form, p)
        return form

    def _add_logprob(self, form: dict[str, Any], told: Logprob) -> None:
        top = {token_text(a.token): a.logprob for a in told.alternatives}
        text = token_text(told.token)
        top.setdefault(text, told.logprob)
        self._add(form, text, told.logprob, top)

    def _add(self, form: dict[str, Any], text: str, logprob: float | None, top: dict[str, float] | None) -> None:
        form["tokens"].append(text)
        form["token_logprobs"].append(logprob)
        form["top_logprobs"].append(top)
        form["text_offset"].append(self._offset)
        self._offset += len(text)


def _columns() -> dict[str, Any]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
