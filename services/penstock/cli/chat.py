"""`penstock chat`: one question, or a conversation line by line, streamed to stdout."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

from cyclopts import Parameter

from penstock.cli.answers import Answering, options, show, show_json
from penstock.cli.connection import Connection, connected
from penstock.client import Message, Stream

__all__ = ["chat"]


def chat(
    message: str | None = None,
    *,
    system: str | None = None,
    answering: Annotated[Answering, Parameter(name="*")] = Answering(),
    connection: Annotated[Connection, Parameter(name="*")] = Connection(),
    whole: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Talk with a model. Without a message, each line of stdin is one turn; Ctrl-D ends, Ctrl-C cuts an answer short.

    Args:
        message: What to say; ends after one answer.
        system: Instructions that stand before the conversation.
        answering: See its fields.
        connection: See its fields.
        whole: One JSON object for each answer instead of text as it comes.
    """
    turns = [Message("system", system)] if system else []
    with connected(connection) as client:
        for said in [message] if message is not None else _lines():
            turns.append(Message("user", said))
            with client.chat(turns, **options(answering)) as stream:
                if whole:
                    turns.append(Message("assistant", show_json(stream)))
                elif message is not None:
                    show(stream)
                else:
                    turns.append(Message("assistant", _turn(stream)))
    return 0


def _turn(stream: Stream) -> str:
    """One answer of a conversation. Ctrl-C ends the answer and not the conversation."""
    heard: list[str] = []
    try:
        show(stream, heard)
    except KeyboardInterrupt:
        stream.close()
        print()
    return "".join(heard)


def _lines() -> Iterator[str]:
    with contextlib.suppress(EOFError):
        while True:
            line = input("> " if sys.stdin.isatty() else "")
            if line.strip():
                yield line
