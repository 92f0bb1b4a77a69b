"""How `generate` and `chat` ask, and how they show a streamed answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, cast

from cyclopts import Parameter

from penstock.client import Closing, Finish, Options, PenstockError, Stream

__all__ = ["Answering", "options", "show", "show_json"]


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How an answer is drawn and when it ends. What is absent is left to the model's own defaults.

    Attributes:
        model: Name of the model, as `penstock models` tells it; the only one where absent.
        max_tokens: New tokens at most.
        temperature: 0 is greedy.
        top_p: Smallest set of most likely tokens with this probability is drawn from.
        top_k: So many of the most likely tokens are drawn from.
        min_p: Tokens less likely than this share of the most likely one are not drawn.
        seed: The same seed gives the same answer.
        stop: A text that ends the answer; once for each.
    """

    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Annotated[tuple[str, ...], Parameter(metavar="STR")] = ()


def options(answering: Answering) -> Options:
    """The call's options: those that were given."""
    given = {name: value for name, value in asdict(answering).items() if value not in {None, "", ()}}
    return cast("Options", given)


def show(stream: Stream, heard: list[str] | None = None) -> None:
    """Write an answer to stdout as it comes, and add its pieces to `heard`. A terminal's stderr gets what it took.

    Raises:
        PenstockError: the answer broke off; what came of it is written.
    """
    heard = [] if heard is None else heard
    try:
        for event in stream:
            if event.text:
                sys.stdout.write(event.text)
                sys.stdout.flush()
                heard.append(event.text)
    except PenstockError:
        if heard:
            _end_line()
        raise
    _end_line()
    if stream.closing is not None and sys.stderr.isatty():
        _tell(stream.closing)


def show_json(stream: Stream) -> str:
    """Write a whole answer to stdout as one JSON object, its text, how it ended, and the closing; the text.

    Raises:
        PenstockError: the answer broke off. What came of it is written, with `error` in place of the closing.
    """
    heard: list[str] = []
    finish: Finish | None = None
    try:
        for event in stream:
            heard.append(event.text)
            finish = event.finish or finish
    except PenstockError as error:
        if heard:
            _write_json({"text": "".join(heard), "finish": None, "error": str(error)})
        raise
    closing = {} if stream.closing is None else asdict(stream.closing)
    _write_json({"text": "".join(heard), "finish": asdict(finish) if finish else None, **closing})
    return "".join(heard)


def _write_json(answer: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(answer, ensure_ascii=False))
    _end_line()


def _end_line() -> None:
    sys.stdout.write("\n")
    sys.stdout.flush()


def _tell(closing: Closing) -> None:
    usage = closing.usage
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    line = f"{usage.prompt_tokens} prompt tokens{cached}, {usage.completion_tokens} new ones in {closing.total_seconds:.2f} s"
    sys.stderr.write(f"\x1b[2m{line}\x1b[0m\n")
