"""`penstock generate`: a prompt continued, streamed to stdout."""

from __future__ import annotations

import re
import sys
from typing import Annotated

from cyclopts import Parameter

from penstock.cli.answers import Answering, options, show, show_json
from penstock.cli.connection import Connection, connected

__all__ = ["generate"]

_LAST_NEWLINE = re.compile(r"\r?\n\Z")


def generate(
    prompt: str | None = None,
    *,
    answering: Annotated[Answering, Parameter(name="*")] = Answering(),
    connection: Annotated[Connection, Parameter(name="*")] = Connection(),
    whole: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Continue a prompt.

    Args:
        prompt: The text to continue; where absent it is read from stdin, without the newline that ends it.
        answering: See its fields.
        connection: See its fields.
        whole: One JSON object at the end instead of text as it comes.
    """
    text = _LAST_NEWLINE.sub("", sys.stdin.read()) if prompt is None else prompt
    with connected(connection) as client, client.generate(text, **options(answering)) as stream:
        if whole:
            show_json(stream)
        else:
            show(stream)
    return 0
