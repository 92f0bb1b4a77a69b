"""How `generate` and `chat` ask, and how they show a streamed answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict

from penstock.v1 import inference_pb2

__all__ = ["Answering", "as_json", "fields", "show"]

Answer = inference_pb2.GenerateResponse | inference_pb2.ChatResponse


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
        stop: Texts that end the answer.
    """

    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


def fields(answering: Answering) -> dict[str, Any]:
    """The request's fields that `Generate` and `Chat` share."""
    sampling = {name: getattr(answering, name) for name in ("temperature", "top_p", "top_k", "min_p", "seed")}
    return {
        "model": answering.model,
        "sampling": inference_pb2.Sampling(**{name: value for name, value in sampling.items() if value is not None}),
        "stopping": inference_pb2.Stopping(max_tokens=answering.max_tokens, stop=answering.stop),
    }


def show(answers: Iterable[Answer]) -> str:
    """Write an answer to stdout as it comes; a terminal's stderr gets what it took. Returns the text."""
    parts: list[str] = []
    for answer in answers:
        if answer.text:
            parts.append(answer.text)
            sys.stdout.write(answer.text)
            sys.stdout.flush()
        if answer.HasField("closing"):
            _tell(answer.closing)
    return "".join(parts)


def as_json(answers: Iterable[Answer]) -> str:
    """A whole answer as one JSON object: its text, how it ended, and the closing message."""
    text, finish, closing = [], {}, {}
    for answer in answers:
        text.append(answer.text)
        if answer.HasField("finish"):
            finish = _plain(answer.finish)
        if answer.HasField("closing"):
            closing = _plain(answer.closing)
    return json.dumps({"text": "".join(text), "finish": finish, **closing}, ensure_ascii=False)


def _plain(message: Any) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _tell(closing: inference_pb2.Closing) -> None:
    sys.stdout.write("\n")
    sys.stdout.flush()
    if sys.stderr.isatty():
        usage, seconds = closing.usage, closing.total_time.ToNanoseconds() / 1e9
        cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
        told = f"{usage.prompt_tokens} prompt tokens{cached}, {usage.completion_tokens} new ones in {seconds:.2f} s"
        sys.stderr.write(f"\x1b[2m{told}\x1b[0m\n")
