"""`penstock chat`: one question, or a conversation line by line, streamed to stdout."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import grpc
from cyclopts import Parameter

from penstock.cli.answers import Answering, as_json, fields, show
from penstock.cli.connection import Connection, connected
from penstock.v1 import inference_pb2, inference_pb2_grpc

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
    turns = [inference_pb2.Message(role="system", content=system)] if system else []
    with connected(connection) as channel:
        for said in [message] if message is not None else _lines():
            turns.append(inference_pb2.Message(role="user", content=said))
            answers = _ask(channel, turns, answering, connection)
            if whole:
                print(as_json(answers), flush=True)
            elif message is not None:
                show(answers)
            else:
                turns.append(inference_pb2.Message(role="assistant", content=_turn(answers)))
    return 0


def _ask(channel: grpc.Channel, turns: Iterable[inference_pb2.Message], answering: Answering, connection: Connection) -> Any:
    request = inference_pb2.ChatRequest(conversation=inference_pb2.Conversation(messages=turns), **fields(answering))
    call = inference_pb2_grpc.InferenceStub(channel).Chat
    return call(request, timeout=connection.timeout, metadata=connection.metadata)


def _turn(answers: Any) -> str:
    """One answer of a conversation. Ctrl-C ends the answer and not the conversation."""
    heard: list[str] = []

    def listen() -> Iterator[inference_pb2.ChatResponse]:
        for answer in answers:
            heard.append(answer.text)
            yield answer

    try:
        show(listen())
    except KeyboardInterrupt:
        answers.cancel()
        print()
    return "".join(heard)


def _lines() -> Iterator[str]:
    with contextlib.suppress(EOFError):
        while True:
            line = input("> " if sys.stdin.isatty() else "")
            if line.strip():
                yield line
