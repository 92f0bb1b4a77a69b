"""`penstock generate`: a prompt continued, streamed to stdout."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from penstock.cli.answers import Answering, options, show, show_json
from penstock.cli.connection import Connection, connected

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
    with connected(connection) as client, client.generate(text, **options(answering)) as stream:
        if whole:
            show_json(stream)
        else:
            show(stream)
    return 0
