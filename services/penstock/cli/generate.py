"""`penstock generate`: a prompt continued, streamed to stdout."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from penstock.cli.answers import Answering, as_json, fields, show
from penstock.cli.connection import Connection, connected
from penstock.v1 import inference_pb2, inference_pb2_grpc

__all__ = ["generate"]


def generate(
    prompt: str | None = None,
    *,
    answering: Annotated[Answering, Parameter(name="*")] = Answering(),
    connection: Annotated[Connection, Parameter(name="*")] = Connection(),
    whole: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Continue a prompt.

    Args:
        prompt: The text to continue; stdin where absent.
        answering: See its fields.
        connection: See its fields.
        whole: One JSON object at the end instead of text as it comes.
    """
    text = sys.stdin.read() if prompt is None else prompt
    request = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text=text), **fields(answering))
    with connected(connection) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate
        answers = call(request, timeout=connection.timeout, metadata=connection.metadata)
        if whole:
            print(as_json(answers))
        else:
            show(answers)
    return 0
