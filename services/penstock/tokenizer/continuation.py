"""A conversation whose last message the model goes on with: rendered only as far as that message's text."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from penstock.common.errors import InvalidRequest

__all__ = ["cut", "marked"]


def marked(messages: Sequence[Mapping[str, str]]) -> tuple[list[Mapping[str, str]], str]:
    """The conversation with a mark behind its last text, and the mark, which nobody can have written before.

    Raises:
        InvalidRequest: the last message has no text.
    """
    *before, last = messages
    if not last["content"].strip():
        raise InvalidRequest.field("messages", "the last one has no text to go on with, as continue_final_message asks")
    mark = secrets.token_hex(16)
    return [*before, {**last, "content": f"{last['content']}{mark} "}], mark


def cut(text: str, mark: str, said: str) -> str:
    """What a template made of such a conversation, up to the mark. Space before it goes where the template trims messages.

    Args:
        text: what it made.
        mark: what stands behind the last text.
        said: that text.

    Raises:
        InvalidRequest: the template leaves the message out, or does not keep it as it is.
    """
    before, found, behind = text.rpartition(mark)
    if not found:
        raise InvalidRequest.field("continue_final_message", "the model's chat template leaves the end of the last message out")
    if not before.rstrip().endswith(said.strip()):
        raise InvalidRequest.field(
            "continue_final_message",
            "the model's chat template does not keep the last message as it is; leave out what it takes away, such as reasoning",
        )
    return before if behind.startswith(" ") else before.rstrip()
