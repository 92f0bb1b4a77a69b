"""Log-probabilities in OpenAI's two forms."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Any

from penstock.gateway.answer import Logprob

__all__ = ["CompletionLogprobs", "chat_logprobs", "prompt_logprobs"]


def token_text(token: bytes) -> str:
    """A token alone; a part of a character shows as U+FFFD, and its `bytes` tell it exactly."""
    return token.decode(errors="replace")


def chat_logprobs(logprobs: Sequence[Logprob]) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat."""
    return {
        "content": [
            {**_entry(p.token, p.logprob), "top_logprobs": [_entry(a.token, a.logprob) for a in p.alternatives]} for p in logprobs
        ],
        "refusal": None,
    }


def _entry(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token_text(token), "logprob": logprob, "bytes": list(token)}


def prompt_logprobs(logprobs: Sequence[Logprob]) -> list[dict[str, Any] | None]:
    """``prompt_logprobs`` as vLLM tells them: for each prompt token what is known of it and of the likely ones, by token id."""
    return [None, *({str(i): entry for i, entry in _ranked(p)} for p in logprobs)]


def _ranked(logprob: Logprob) -> list[tuple[int, dict[str, Any]]]:
    likely = [
        (a.token_id, {"logprob": a.logprob, "rank": rank, "decoded_token": token_text(a.token)})
        for rank, a in enumerate(logprob.alternatives, 1)
    ]
    return [
        *likely,
        (logprob.token_id, {"logprob": logprob.logprob, "rank": logprob.rank, "decoded_token": token_text(logprob.token)}),
    ]


class CompletionLogprobs:
    """``choices[].logprobs`` of a completion's choice, whose offsets go on from chunk to chunk."""

    def __init__(self) -> None:
        # Characters of the text so far, and the bytes of the one that tokens have begun: an offset is where a token's first
        # character begins.
        self._offset = 0
        self._held = b""

    def prompt(self, text: str, first: bytes, logprobs: Sequence[Logprob]) -> dict[str, Any]:
        """Those of an echoed prompt; of its `first` token only the bytes are known.

        Tokens are found in the text by their characters. One that does not stand there, such as a special token, takes up none
        of it.
        """
        form = _columns()
        for token, known in ((first, None), *((p.token, p) for p in logprobs)):
            fits = (t for t in (token, token.removeprefix(b" ")) if text.startswith(self._decode(t)[0], self._offset))
            self._add(form, token, known, next(fits, b""))
        self._offset, self._held = len(text), b""
        return form

    def output(self, logprobs: Sequence[Logprob], form: dict[str, Any] | None = None) -> dict[str, Any]:
        """Those of output tokens, behind those of a form that was begun."""
        form = form if form is not None else _columns()
        for p in logprobs:
            self._add(form, p.token, p, p.token)
        return form

    def _add(self, form: dict[str, Any], token: bytes, logprob: Logprob | None, shown: bytes) -> None:
        """Add a token, of which these bytes stand in the text."""
        text, top = token_text(token), None
        if logprob is not None:
            top = {token_text(a.token): a.logprob for a in logprob.alternatives}
            top.setdefault(text, logprob.logprob)
        form["tokens"].append(text)
        form["token_logprobs"].append(logprob.logprob if logprob is not None else None)
        form["top_logprobs"].append(top)
        form["text_offset"].append(self._begin(shown))
        added, self._held = self._decode(shown)
        self._offset += len(added)

    def _begin(self, token: bytes) -> int:
        """Where a token's first character begins: behind what was begun before it, if the token does not go on with that."""
        characters = (self._held + token[:1]).decode(errors="replace")
        return self._offset + max(0, len(characters) - 1)

    def _decode(self, token: bytes) -> tuple[str, bytes]:
        """The characters that a token completes, and the bytes of one that it leaves begun."""
        content = self._held + token
        text, consumed = utf_8_decode(content, "replace", False)
        return text, content[consumed:]


def _columns() -> dict[str, Any]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
